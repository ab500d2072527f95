"""One of two values for each element, by their bits: no pattern is too irregular to be quick."""

from __future__ import annotations

import torch
from torch import Tensor


def bits_of(values: Tensor) -> Tensor:
    """Return the values' memory as integers; the lowest integer is the bit of the sign."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)


def choose(holds: Tensor, one: Tensor, other: Tensor, out: Tensor) -> Tensor:
    """Return (n,) `one` where `holds` is 1, `other` where it is 0, in the memory of `out`.

    `holds` is integers as wide as the values, and is not kept.
    """
    mask, found = holds.neg_(), bits_of(out)  # all bits, or none
    torch.bitwise_xor(bits_of(one), bits_of(other), out=found).bitwise_and_(mask)
    found.bitwise_xor_(bits_of(other))
    return out
