"""Sign election and the disjoint merge (TIES-Merging, Yadav et al. 2023, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ft.algebra.choice import bits_of

ROWS = 3  # of scratch
SIGN = {torch.float32: -(2**31), torch.float64: -(2**63)}  # the bit of a sum that is elected


def disjoint_merge(
    deltas: Tensor, weights: Sequence[float], normalize: bool, scratch: Tensor
) -> Tensor:
    """Return the (n,) sum of the weighted deltas that have the elected sign, in their memory.

    The sign of an element is that of the sum of weighted deltas, + where it is zero; normalised,
    the sum is divided by the weights of the deltas heard at that element.
    """
    for row, weight in zip(deltas, weights, strict=True):
        if weight != 1.0:
            row.mul_(weight)
    return merge_weighted(deltas, weights, normalize, scratch)


def merge_weighted(
    deltas: Tensor, weights: Sequence[float], normalize: bool, scratch: Tensor
) -> Tensor:
    """Return the same of deltas that have been multiplied by their weights."""
    rows, (sign, heard, spare) = deltas.unbind(), scratch[:ROWS].unbind()
    elected = torch.bitwise_and(bits_of(_sum(rows, spare)), SIGN[sign.dtype], out=bits_of(sign))
    for row in rows:
        bits_of(row).bitwise_xor_(elected)
        torch.relu_(row)
    if normalize:
        _weights_heard(rows, weights, heard, spare)
    mix = rows[0]
    for row in rows[1:]:
        mix.add_(row)
    bits_of(mix).bitwise_xor_(elected)
    return mix.div_(heard) if normalize else mix


def _sum(rows: Sequence[Tensor], out: Tensor) -> Tensor:
    """Add up rows into `out`, in order; a single row is its own sum."""
    total = rows[0]
    for row in rows[1:]:
        total = torch.add(total, row, out=out)
    return total


def _weights_heard(
    agreeing: Sequence[Tensor], weights: Sequence[float], heard: Tensor, spare: Tensor
) -> None:
    """Sum up, in `heard`, the weights of the rows that are above zero; 1 where they come to 0."""
    torch.gt(agreeing[0], 0, out=heard).mul_(weights[0])
    for row, weight in zip(agreeing[1:], weights[1:], strict=True):
        heard.add_(torch.gt(row, 0, out=spare), alpha=weight)
    if min(weights) > 0.0:
        heard.clamp_(min=min(weights))  # where nobody is heard zero is divided, by whatever
    else:
        heard.add_(torch.eq(heard, 0, out=spare))


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
