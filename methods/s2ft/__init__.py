"""S2FT: tune whole heads and channels, drawn over all layers, by slices of their matrices."""

from mergekit_ft.methods.s2ft.s2ft import S2ft

__all__ = ["S2ft"]
