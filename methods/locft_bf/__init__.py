"""LocFT-BF: facts trained into one matrix, breadth-first, by the layers above it alone."""

from mergekit_ft.methods.locft_bf.locft_bf import LocftBf

__all__ = ["LocftBf"]
