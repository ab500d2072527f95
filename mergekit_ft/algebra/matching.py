"""How far to move a distribution so that it is as far from where it was as experts are from theirs.

By place, of one expert at a time, over a grid (Fan et al. 2024, arXiv:2406.15480).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError


def both_kl(one: Tensor, other: Tensor) -> Tensor:
    """Return (2, n) KL(one || other) and KL(other || one) of (n, vocabulary) log-probabilities."""
    gap = one - other
    return torch.stack([(one.exp() * gap).sum(-1), -(other.exp() * gap).sum(-1)])


def matched(base: Tensor, small: Tensor, tuned: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) the best expert of each place and (n,) its factor, of those on the grid.

    All are log-probabilities, float64. Of equal ones the first expert and the smallest factor.
    OperatorError where there is a NaN.
    """
    wanted = torch.stack([both_kl(expert, small) for expert in tuned])  # (k, 2, n)
    n = len(base)
    best = torch.full((n,), torch.inf, dtype=torch.float64)
    which, factor = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.float64)
    for t, expert in enumerate(tuned):
        move = expert - small
        for alpha in grid.tolist():
            fused = torch.log_softmax(base + alpha * move, -1)
            loss = (both_kl(fused, base) - wanted).square().sum(dim=(0, 1))
            better = loss < best
            best = torch.where(better, loss, best)
            which[better], factor[better] = t, alpha
    if not bool(torch.isfinite(best).all()):
        raise OperatorError("the search met values that are not numbers")
    return which, factor
