"""Supervised fine-tuning held near the model before tuning by a KL term."""

from mergekit_ft.methods.sft_kl.sft_kl import SftKl

__all__ = ["SftKl"]
