"""Sign election and the disjoint merge (TIES-Merging, Yadav et al. 2023, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 4  # of scratch


def disjoint_merge(
    deltas: Tensor, weights: Sequence[float], normalize: bool, scratch: Tensor
) -> Tensor:
    """Return the (n,) sum of the weighted deltas that have the elected sign.

    The sign of an element is that of the sum of weighted deltas, + where it is zero; normalised,
    the sum is divided by the weights of the deltas heard at that element.
    """
    sign, mix, heard, mask = scratch[0], scratch[1].zero_(), scratch[2].zero_(), scratch[3]
    for i, weight in enumerate(weights):
        deltas[i].mul_(weight)
    torch.ge(_sum(deltas, mask), 0, out=sign).mul_(2).sub_(1)
    for i, weight in enumerate(weights):
        agreeing = deltas[i].mul_(sign).clamp_(min=0)
        mix.add_(agreeing)
        if normalize:
            heard.add_(torch.gt(agreeing, 0, out=mask), alpha=weight)
    mix.mul_(sign)
    return mix.div_(heard.add_(torch.eq(heard, 0, out=mask))) if normalize else mix


def _sum(rows: Tensor, out: Tensor) -> Tensor:
    """Add up (k, n) rows into `out`, in order."""
    out.copy_(rows[0])
    for row in rows[1:]:
        out.add_(row)
    return out


def reference_disjoint_merge(
    deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool
) -> Tensor:
    """Return the same as plain expressions."""
    weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0).to(weighted.dtype)
    kept = weighted.sign() == sign
    mix = (weighted * kept).sum(0)
    shape = (-1,) + (1,) * (weighted.dim() - 1)
    heard = (torch.tensor(weights, dtype=mix.dtype).view(shape) * kept).sum(0)
    return mix / torch.where(heard == 0, 1.0, heard) if normalize else mix
