"""Supervised fine-tuning: the negative log-likelihood of the answer's tokens."""

from mergekit_ft.methods.sft.sft import Sft

__all__ = ["Sft"]
