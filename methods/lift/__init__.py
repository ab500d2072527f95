"""LIFT: tune the entries that are largest in a low-rank approximation of their matrix."""

from mergekit_ft.methods.lift.lift import Lift

__all__ = ["Lift"]
