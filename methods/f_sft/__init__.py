"""Supervised fine-tuning by an f-divergence from the model before tuning (derived)."""

from mergekit_ft.methods.f_sft.f_sft import FSft

__all__ = ["FSft"]
