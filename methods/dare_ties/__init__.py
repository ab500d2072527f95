"""DARE-TIES: drop random entries, rescale the rest, merge those whose sign is elected."""

from mergekit_ft.methods.dare_ties.dare_ties import DareTies

__all__ = ["DareTies"]
