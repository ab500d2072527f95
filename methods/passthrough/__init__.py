"""Passthrough: one model as it is, or scaled."""

from mergekit_ft.methods.passthrough.passthrough import Passthrough

__all__ = ["Passthrough"]
