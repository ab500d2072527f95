"""How far apart two merges are."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.peers.both import Merged


def relative_distance(merged: Merged) -> Tensor:
    """Return, for each element, |ours - theirs| over the largest value that went into it.

    Where values cancel, what is left of them is no measure of a rounding.
    """
    assert merged.ours.dtype == merged.theirs.dtype
    ours, theirs = merged.ours.double(), merged.theirs.double()
    scale = torch.stack([ours, *(source.double() for source in merged.sources)]).abs().amax(0)
    apart = (ours - theirs).abs()
    return torch.where(apart > 0, apart / scale, 0.0)


def units_apart(merged: Merged) -> Tensor:
    """Return, for each element, how many steps from float to next float lie between the two."""
    assert merged.ours.dtype == merged.theirs.dtype
    return (_ordinals(merged.ours) - _ordinals(merged.theirs)).abs()


def _ordinals(tensor: Tensor) -> Tensor:
    """Return integers that count up as the floats do; both zeros are 0."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(width).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(width).min - bits, bits)
