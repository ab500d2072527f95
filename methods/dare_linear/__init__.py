"""DARE: drop random entries of each task vector, rescale the rest, add them up."""

from mergekit_ft.methods.dare_linear.dare_linear import DareLinear

__all__ = ["DareLinear"]
