"""Arcee Fusion (Arcee AI 2024): of another model, only the changes that stand out are taken over.

For the base a and a model b, p = softmax(b) + 1e-8 and q = softmax(a) + 1e-8 along each row:

    KL     = sum over the row of p ln(p / q)
    s      = |b - a| KL                                     the importance of each element
    theta  = b where s >= s_50 + 1.5 (s_75 - s_25), else a

where s_q is the element of rank trunc(q/100 (n - 1)), from 0, of the tensor's n sorted importances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_ft.algebra import selection
from mergekit_ft.algebra.cells import cells, exact
from mergekit_ft.contract import About, Block, Grain, Operator, Survey, row_of

QUARTILES = (0.25, 0.5, 0.75)
SPREAD = 1.5  # quartile distances above the median an element stands out
LEAST = 1e-8  # added to every probability
AT = 1.0 - 1e-6  # of the threshold: what is as near below it as a rounding may be is at it


class ArceeFusion(Operator):
    """Only the changes that stand out are taken over from another model."""

    tuned: ClassVar[tuple[int, int | None]] = (1, 1)
    yields_delta: ClassVar[bool] = False

    @property
    def grain(self) -> Grain:
        """Return whole rows: a softmax runs along each."""
        return Grain.ROW

    def scratch(self, k: int) -> int:
        """Return the rows that selecting three of one tensor's importances needs."""
        return selection.scratch(len(QUARTILES))

    def survey(self, about: About) -> Survey:
        """Find, exactly, the importance from which an element stands out."""
        counts = [about.numel - math.trunc(q * (about.numel - 1)) for q in QUARTILES]
        cuts = yield from selection.largest(counts, _importance, about)
        low, median, high = (cut.threshold for cut in cuts if cut is not None)
        return (median + SPREAD * (high - low)) * AT

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the other model's values where they stand out, else the base's."""
        stands_out = _importance(block, 0).ge(finding)
        return torch.where(stands_out, block.tuned[0], block.base, out=block.scratch[1])

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the same in float64; sorts, where the survey selects."""
        b = tuned[0]
        importance = _scores(*(x.reshape(-1, row_of(tuple(base.shape))) for x in (base, b)))
        ordered = importance.flatten().sort().values
        ranks = [math.trunc(q * (len(ordered) - 1)) for q in QUARTILES]
        low, median, high = (float(ordered[rank]) for rank in ranks)
        stands_out = importance >= (median + SPREAD * (high - low)) * AT
        return torch.where(stands_out.view_as(base), b, base)


def _importance(block: Block, _: int) -> Tensor:
    """Return (n,) the importances in scratch row 0, worked out in float64, once for a block."""
    if block.made is not None:
        return block.made
    found = block.made = block.scratch[0]
    length = row_of(block.shape)
    for run in cells(block.n, block.cell):
        a, b = (exact(x[run]).view(-1, length) for x in (block.base, block.tuned[0]))
        found[run].copy_(_scores(a, b).flatten())
    return found


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """Return the importances of (m, length) rows."""
    p, q = (torch.softmax(rows, -1).add_(LEAST) for rows in (b, a))
    logs = torch.div(p, q, out=q).log_()
    divergence = logs.mul_(p).sum(-1, keepdim=True).clamp_(min=0.0)
    return torch.sub(b, a, out=p).abs_().mul_(divergence)
