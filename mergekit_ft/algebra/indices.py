"""Sorted flat indices as the gaps between them, in 16 bits.

A code c > 0 is an entry c places after the one before (the first counts from -1); 0 is no entry but
an escape, that moves on by 32,767 places. So wide gaps cost an escape each, and nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 32_767  # places that one code can move on


def gaps(indices: Tensor, before: int = -1) -> Tensor:
    """Return the codes (m,) int16 of strictly increasing indices (n,) int64, m >= n."""
    steps = torch.diff(indices, prepend=indices.new_tensor([before]))  # (n,) all >= 1
    escapes = (steps - 1).div(WIDEST, rounding_mode="floor")  # (n,) before each entry
    ends = torch.cumsum(escapes + 1, 0) - 1  # (n,) where each entry's own code stands
    codes = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.int16)
    codes[ends] = (steps - escapes * WIDEST).to(torch.int16)
    return codes


def coded(indices: Tensor, before: int = -1) -> int:
    """Return how many codes `gaps` makes of these indices."""
    steps = torch.diff(indices, prepend=indices.new_tensor([before]))
    return len(indices) + int((steps - 1).div(WIDEST, rounding_mode="floor").sum())


def places(codes: Tensor, before: int = -1) -> Tensor:
    """Return (m,) int64 where each code leads, escapes too; the last one is the next `before`."""
    steps = codes.to(torch.int64)
    return torch.where(steps == 0, WIDEST, steps).cumsum(0) + before


def ungapped(codes: Tensor, before: int = -1) -> Tensor:
    """Return the indices (n,) int64 that these codes (m,) int16 stand for."""
    return places(codes, before)[codes != 0]
