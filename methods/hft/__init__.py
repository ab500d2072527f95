"""HFT: half fine-tuning, a random half of each block's matrices frozen."""

from mergekit_ft.methods.hft.hft import Hft

__all__ = ["Hft"]
