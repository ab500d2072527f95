"""How far apart two merges are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Distance(NamedTuple):
    """Of one tensor merged by both toolkits."""

    differing: float  # share of elements whose bits differ
    relative: float  # largest |ours - theirs| over the largest |value| merged into the element


def distance(ours: Tensor, theirs: Tensor, sources: Sequence[Tensor]) -> Distance:
    """Return the distance; where values cancel, their own size is no measure of a rounding."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    one, other = ours.double(), theirs.double()
    scale = torch.stack([one, *(source.double() for source in sources)]).abs().amax(0)
    apart = (one - other).abs()
    relative = torch.where(apart > 0, apart / scale, 0.0)
    return Distance(float((apart > 0).double().mean()), float(relative.max()))


def units_apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return for each element how many floats of its dtype lie between the two, plus one."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return (_ordinals(ours) - _ordinals(theirs)).abs()


def _ordinals(tensor: Tensor) -> Tensor:
    """Return integers that count up as the floats do; both zeros are 0."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(width).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(width).min - bits, bits)
