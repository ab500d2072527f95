"""Consensus merging: only the entries that several tasks need, by TALL masks."""

from mergekit_ft.methods.consensus.consensus import Consensus

__all__ = ["Consensus"]
