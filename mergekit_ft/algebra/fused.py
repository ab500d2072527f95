"""The distribution that several models make together, and its moments.

P_a = softmax(base + sum_t a_t d_t), d_t = tuned_t - small, over a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def shifts(tuned: Tensor, small: Tensor) -> Tensor:
    """Return (k, n, vocabulary) float64: how each expert moves the logits."""
    return tuned.double().sub_(small.double())


def fuse(base: Tensor, moves: Tensor, alpha: Tensor) -> Tensor:
    """Return (n, vocabulary) float64 log-probabilities; alpha (k,) or, by place, (k, n)."""
    factors = alpha.double().reshape(len(moves), -1, 1)
    logits = base.double() + (factors * moves).sum(0)
    return torch.log_softmax(logits, -1)


def moments(logs: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, k) means and (n, k, k) covariances of the moves under (n, vocabulary) logs."""
    chances = logs.exp()
    means = torch.einsum("nv,knv->nk", chances, moves)
    centred = moves - means.T[:, :, None]
    spread = torch.einsum("knv,nv,jnv->nkj", centred, chances, centred)
    return means, spread


def exact_sum(rows: Iterable[Tensor]) -> Tensor:
    """Return the sum of (n, s) float64 pieces over n, rounded once: no order changes a bit."""
    table = torch.cat(list(rows)).T
    return torch.tensor([math.fsum(column) for column in table.tolist()], dtype=torch.float64)
