"""Logits of several models, heard together: weights fitted, and put into weights."""

from mergekit_ft.fusion.baking import Baked, bake
from mergekit_ft.fusion.fitting import Fit, fit
from mergekit_ft.fusion.merging import merge

__all__ = ["Baked", "Fit", "bake", "fit", "merge"]
