"""One vector for several task vectors, and for each a mask of the entries that it takes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 2  # of scratch


def elected(deltas: Tensor, scratch: Tensor) -> Tensor:
    """Return EMR's (n,) vector in scratch row 0; the (T, n) task vectors become their masks.

    The sign is that of the mean, minus where it is 0; the size is the largest of that sign.
    """
    sign, largest = summed(deltas, scratch[0]), scratch[1].zero_()
    torch.gt(sign, 0, out=sign).mul_(2).sub_(1)
    for delta in deltas:
        delta.mul_(sign).clamp_(min=0)
        torch.maximum(largest, delta, out=largest)
        delta.gt_(0)
    return sign.mul_(largest)


def needed(deltas: Tensor, thresholds: Sequence[float], scratch: Tensor) -> Tensor:
    """Return the (n,) sum in scratch row 0; the (T, n) task vectors become their TALL masks."""
    total, spare = summed(deltas, scratch[0]), scratch[1]
    for delta, threshold in zip(deltas, thresholds, strict=True):
        torch.sub(total, delta, out=spare).abs_().mul_(threshold)
        torch.gt(delta.abs_(), spare, out=delta)
    return total


def summed(deltas: Tensor, out: Tensor) -> Tensor:
    """Add up the (T, n) task vectors in their order, so that no cutting of blocks moves a bit."""
    out.copy_(deltas[0])
    for delta in deltas[1:]:
        out.add_(delta)
    return out
