"""LiNeS: scale the delta of each layer by a line in its depth."""

from mergekit_ft.methods.lines.lines import Lines

__all__ = ["Lines"]
