"""SLERP: interpolation between two models along the arc of a great circle."""

from mergekit_ft.methods.slerp.slerp import Slerp

__all__ = ["Slerp"]
