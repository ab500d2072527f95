"""Logits of several models: fused while they speak, weights fitted, and put into weights."""

from mergekit_ft.fusion.baking import Baked, bake
from mergekit_ft.fusion.fitting import Fit, fit
from mergekit_ft.fusion.generating import Generated, generate
from mergekit_ft.fusion.merging import merge
from mergekit_ft.fusion.opening import FusedModels, fused_models
from mergekit_ft.fusion.speaking import Fixed, FusedSpeaker, Searched

__all__ = [
    "Baked",
    "Fit",
    "Fixed",
    "FusedModels",
    "FusedSpeaker",
    "Generated",
    "Searched",
    "bake",
    "fit",
    "fused_models",
    "generate",
    "merge",
]
