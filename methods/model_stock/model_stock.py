"""Model Stock (Jang et al. 2024, arXiv:2403.19522, section 4), tensor by tensor, or row by row.

For task vectors  d_i = theta_i - theta_0  of N fine-tuned models:

    cos(phi)  = the mean over all pairs of d_i.d_j / (|d_i| |d_j|)
    t         = N cos(phi) / (1 + (N - 1) cos(phi))
    theta     = t mean_i(theta_i) + (1 - t) theta_0
              = theta_0 + t mean_i(d_i)

Where the denominator of t vanishes, t is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_ft.algebra import gram
from mergekit_ft.algebra.cells import cells, totals
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.contract import About, Block, Grain, Operator, Survey, row_of, shared

SHORTEST = 1e-6  # the product of two norms is taken for at least this
VANISHED = 1e-6  # of the denominator of t


class ModelStock(Operator):
    """The mean of fine-tunes, drawn to the base the more they disagree."""

    tuned: ClassVar[tuple[int, int | None]] = (2, None)

    filter_wise: bool = shared(False, description="a ratio for each row, not for each tensor")

    @property
    def grain(self) -> Grain:
        """Return whole rows, where each has its own ratio."""
        return Grain.ROW if self.filter_wise else Grain.ELEMENT

    def survey(self, about: About) -> Survey:
        """Find the tensor's ratio t from one pass over all models."""
        if self.filter_wise:
            return None
        (rows,) = yield (gram.measure(),)
        products = torch.tensor(totals(rows), dtype=torch.float64)
        return float(_ratio(products[:, None], len(about.ids)))

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        k = len(block.tuned)
        deltas = subtract_base(block.tuned, block.base)
        if finding is None:
            length = row_of(block.shape)
            for run in cells(block.n, block.cell):
                rows = deltas[:, run].view(k, -1, length)
                ratio = _ratio(gram.row_products(rows.unbind()), k).div_(k).unsqueeze(-1)
                rows.mul_(ratio.to(rows.device, rows.dtype))
        for delta in deltas[1:]:
            deltas[0].add_(delta)
        return deltas[0] if finding is None else deltas[0].mul_(finding / k)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64."""
        deltas = torch.stack([x - base for x in tuned])
        length = row_of(tuple(base.shape)) if self.filter_wise else base.numel()
        rows = deltas.view(len(tuned), -1, length)
        unit = [rows[i] / rows[i].norm(dim=-1, keepdim=True) for i in range(len(tuned))]
        apart = [(i, j) for i, j in gram.pairs(len(tuned)) if i < j]
        cosine = torch.stack([(unit[i] * unit[j]).sum(-1) for i, j in apart]).mean(0).nan_to_num()
        ratio = len(tuned) * cosine / (1.0 + (len(tuned) - 1) * cosine)
        return (ratio[:, None] * rows.mean(0)).view_as(base)


def _ratio(products: Tensor, k: int) -> Tensor:
    """Return (m,) the ratios t from the (pairs, m) dot products of k task vectors."""
    of = dict(zip(gram.pairs(k), products, strict=True))
    total = torch.zeros_like(products[0])
    for i, j in (pair for pair in of if pair[0] < pair[1]):
        norms = (of[i, i].sqrt() * of[j, j].sqrt()).clamp_(min=SHORTEST)
        total += (of[i, j] / norms).clamp_(-1.0, 1.0)
    cosine = total / (k * (k - 1) / 2)
    below = 1.0 + (k - 1) * cosine
    vanished = below.abs() < VANISHED
    return (k * cosine / below.masked_fill(vanished, 1.0)).masked_fill_(vanished, 0.0)
