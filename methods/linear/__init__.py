"""Linear: the weighted average of models."""

from mergekit_ft.methods.linear.linear import Linear

__all__ = ["Linear"]
