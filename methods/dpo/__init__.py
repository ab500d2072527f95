"""DPO: direct preference optimisation on pairs of answers."""

from mergekit_ft.methods.dpo.dpo import Dpo

__all__ = ["Dpo"]
