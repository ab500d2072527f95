"""Deltas: what a tuned model adds to its base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def subtract_base(tuned: Tensor, base: Tensor) -> Tensor:
    """Turn the (k, n) tuned values into deltas, in place."""
    return tuned.sub_(base)


def add_base(base: Tensor, delta: Tensor) -> Tensor:
    """Return base + delta in delta's memory; where delta is zero, base's own bits.

    0 - delta is never -0, and base - (+0) is base even for -0, which base + (+0) is not.
    """
    zero = torch.zeros((), dtype=delta.dtype, device=delta.device)
    torch.sub(zero, delta, out=delta)
    return torch.sub(base, delta, out=delta)


def subtract_weighted(base: Tensor, differences: Tensor, weights: Sequence[float]) -> Tensor:
    """Return base - sum of weights[i] * differences[i], in the memory of base.

    Where every difference is +0 base's own bits come out, -0 included: what is taken away is +0,
    because for a negative weight both it and the difference change sign first.
    """
    for difference, weight in zip(differences, weights, strict=True):
        if weight < 0.0:
            torch.sub(torch.zeros_like(difference[:1]), difference, out=difference)
        if weight != 0.0:
            torch.sub(base, difference, alpha=abs(weight), out=base)
    return base


def weighted_sum(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the (n,) sum of weights[i] * rows[i] in the memory of the first row."""
    total = rows[0].mul_(weights[0])
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total.add_(row, alpha=weight)
    return total


def scaled(total: Tensor, weights: Sequence[float], normalize: bool, lambda_: float) -> Tensor:
    """Divide a weighted sum by the sum of its weights, where asked, and multiply by lambda."""
    if normalize:
        total.div_(divisor(weights))
    return total if lambda_ == 1.0 else total.mul_(lambda_)


def divisor(weights: Sequence[float]) -> float:
    """Return the sum of the weights; 1 where it vanishes."""
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def sole_model(weights: Sequence[float], normalize: bool, lambda_: float) -> int | None:
    """Return the model that a weighted sum of deltas gives unchanged; -1 for the base."""
    if lambda_ == 0.0 or not any(weights):
        return -1
    heard = [i for i, weight in enumerate(weights) if weight != 0.0]
    weight = weights[heard[0]]
    factor = lambda_ * (weight / divisor([weight]) if normalize else weight)
    return heard[0] if len(heard) == 1 and factor == 1.0 else None
