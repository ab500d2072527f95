"""Reward-weighted fine-tuning: each row's likelihood by exp(reward / temperature)."""

from mergekit_ft.methods.weighted.weighted import Weighted

__all__ = ["Weighted"]
