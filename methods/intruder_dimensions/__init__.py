"""Intruder dimensions: directions that tuning added to a matrix and its base has not."""

from mergekit_ft.methods.intruder_dimensions.intruder_dimensions import IntruderDimensions

__all__ = ["IntruderDimensions"]
