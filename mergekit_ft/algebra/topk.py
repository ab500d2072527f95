"""The entries with the largest scores over many tensors, exactly k, one tensor in memory at a time.

The bits of a non-negative float32 order as the float does, so counting them 16 at a time finds the
k-th score in two passes; a third collects. Of equal scores the first are taken: in the order of the
tensors, then by index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Scores = Mapping[str, Callable[[], Tensor]]  # name -> what gives its (n,) non-negative scores
BINS = 1 << 16


def largest(scores: Scores, k: int) -> dict[str, Tensor]:
    """Return the flat indices (int64, increasing) of the k largest scores, by tensor."""
    if k <= 0:
        return {}
    high, left = _bin(scores, k, lambda bits: bits >> 16, None)
    low, ties = _bin(scores, left, lambda bits: bits & (BINS - 1), high)
    threshold = (high << 16) | low
    found: dict[str, Tensor] = {}
    for name, score in scores.items():
        bits = _bits(score())
        equal = (bits == threshold).nonzero().flatten()[:ties]
        ties -= len(equal)
        above = (bits > threshold).nonzero().flatten()
        indices = torch.cat([above, equal]).sort().values
        if len(indices):
            found[name] = indices
    return found


def smallest(scores: Scores, k: int) -> dict[str, Tensor]:
    """Return the flat indices (int64, increasing) of the k smallest scores, by tensor."""
    return largest({name: _turned(score) for name, score in scores.items()}, k)


def narrow(indices: Tensor, numel: int) -> Tensor:
    """Return indices in 32 bits, where a tensor of so many elements allows it."""
    return indices.to(torch.int32 if numel <= 2**31 else torch.int64)


def _turned(score: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return scores in the opposite order, as floats of the opposite bits."""
    most = 0x7F7FFFFF  # the bits of the largest finite float32
    return lambda: (most - _bits(score())).view(torch.float32)


def _bits(score: Tensor) -> Tensor:
    """Return (n,) int32 that order as the scores do."""
    flat = score.detach().flatten().to(torch.float32)
    return flat.abs().contiguous().view(torch.int32)


def _bin(
    scores: Scores, k: int, part: Callable[[Tensor], Tensor], high: int | None
) -> tuple[int, int]:
    """Return the bin that holds the k-th largest, and how many of it are among the k.

    With `high` only those are counted whose upper 16 bits are these.
    """
    counts = torch.zeros(BINS, dtype=torch.int64)
    for score in scores.values():
        bits = _bits(score())
        bits = bits if high is None else bits[(bits >> 16) == high]
        counts += torch.bincount(part(bits).cpu(), minlength=BINS)
    above = counts.flip(0).cumsum(0).flip(0)  # (BINS,) of this bin and higher ones
    if int(above[0]) < k:
        raise ValueError(f"{k} entries of {int(above[0])} cannot be chosen")
    chosen = int((above >= k).nonzero()[-1])
    return chosen, k - int(above[chosen] - counts[chosen])
