"""DELLA without election: drop the smaller entries the likelier, rescale, add them up."""

from mergekit_ft.methods.della_linear.della_linear import DellaLinear

__all__ = ["DellaLinear"]
