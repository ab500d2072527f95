"""Arcee Fusion: only the changes that stand out are taken over from another model."""

from mergekit_ft.methods.arcee_fusion.arcee_fusion import ArceeFusion

__all__ = ["ArceeFusion"]
