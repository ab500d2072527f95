"""LT-SFT: tune everything, keep the entries that moved most, rewind, and tune those alone."""

from mergekit_ft.methods.lt_sft.lt_sft import LtSft

__all__ = ["LtSft"]
