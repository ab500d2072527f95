"""SaRA: tune the entries that are near zero in the base, with a low-rank penalty."""

from mergekit_ft.methods.sara.sara import Sara

__all__ = ["Sara"]
