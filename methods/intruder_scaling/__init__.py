"""Intruder scaling: the directions that tuning added to each matrix, made weaker."""

from mergekit_ft.methods.intruder_scaling.intruder_scaling import IntruderScaling

__all__ = ["IntruderScaling"]
