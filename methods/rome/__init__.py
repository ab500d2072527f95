"""ROME: facts written one after another into one layer, as rank-one updates."""

from mergekit_ft.methods.rome.rome import Rome

__all__ = ["Rome"]
