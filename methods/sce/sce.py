"""SCE (Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3), tensor by tensor.

For task vectors  d_t = theta_t - theta_0  of k tuned models:

    select     v      = variance over t of d_t; the `select_topk` largest of the variances that
                      are not zero keep their place, d'_t is 0 elsewhere
    calculate  w_t    = mean of d'_t^2, divided by the sum over the models
    erase      s      = sign(sum_t d'_t), + where the sum is zero
               d      = weighted mean of the d'_t whose sign is s
    return     theta_0 + d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_ft.algebra import selection
from mergekit_ft.algebra.cells import by_cell, count_ones, exact, totals
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.algebra.selection import Cut
from mergekit_ft.contract import About, Block, Measure, Operator, Place, Share, Survey, shared

MEAN = selection.scratch(1)  # the row of scratch that no selection takes
LEAST = 1e-6  # mean squares that add up to less weigh the models alike; least divisor


class Chosen(NamedTuple):
    """What the survey finds."""

    cut: Cut | None  # of the variances; None: every place is kept
    weights: list[float]  # (k,)


class Sce(Operator):
    """Keep where models differ most, weigh them by their squares, merge those that agree."""

    select_topk: Share = shared(1.0, description="share of the places that differ that is kept")
    int8_mask: bool = shared(False, description="accepted for mergekit plans; changes no value")

    def scratch(self, k: int) -> int:
        """Return the rows that selection needs, and one more for a mean."""
        return MEAN + 1

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the only model; the base where nothing is kept: one model does not vary."""
        if self.select_topk == 0.0 or (k == 1 and self.select_topk < 1.0):
            return -1
        return 0 if k == 1 else None

    def survey(self, about: About) -> Survey:
        """Find the places that are kept and the models' weights; None where no place is."""
        cut = None
        if self.select_topk < 1.0:
            (differing,) = yield (Measure(_differing),)
            count = math.trunc(int(differing) * self.select_topk)
            if not count:
                return None
            (cut,) = yield from selection.largest([count], _variance, about, signed=False)
        (rows,) = yield (Measure(lambda block: _squares(block, cut), cells=True),)
        return Chosen(cut, _shares([total / about.numel for total in totals(rows)]))

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        if finding is None:
            return block.tuned[0].zero_()
        cut, weights = finding
        kept = None if cut is None else _kept(block, cut)
        deltas = subtract_base(block.tuned, block.base)
        sign, mix, heard = block.scratch[1], block.scratch[2], block.scratch[3]
        mix.copy_(deltas[0])
        for delta in deltas[1:]:
            mix.add_(delta)
        torch.ge(mix, 0, out=sign).mul_(2).sub_(1)
        mix.zero_()
        heard.zero_()
        for delta, weight in zip(deltas, weights, strict=True):
            agreeing = delta.mul_(sign).clamp_(min=0)
            mix.add_(agreeing, alpha=weight)
            heard.add_(agreeing.gt_(0), alpha=weight)
        mix.mul_(sign).div_(heard.clamp_(min=LEAST))
        return mix if kept is None else mix.mul_(kept)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64; sorts, where `merge` counts."""
        deltas = torch.stack([(x - base).flatten() for x in tuned])
        if self.select_topk < 1.0:
            variance = deltas.var(dim=0, correction=0)
            variance[(deltas == deltas[0]).all(0)] = 0.0
            count = math.trunc(int(variance.count_nonzero()) * self.select_topk)
            deltas = deltas * (selection.reference_keep(variance, count) > 0)
        weights = torch.tensor(_shares(deltas.square().mean(1).tolist()), dtype=deltas.dtype)
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(deltas.dtype)
        agreeing = weights[:, None] * (deltas.sign() == sign)
        return ((agreeing * deltas).sum(0) / agreeing.sum(0).clamp(min=LEAST)).view_as(base)


def _variance(block: Block, _: int) -> Tensor:
    """Return (n,) the variance over the models, zero where all are equal, in scratch row 0.

    The base cancels out. What differs from the first model is averaged, so that nothing is lost
    where models are near one another and far from zero.
    """
    first, *others = block.tuned
    k = len(others) + 1
    if k == 2:  # each lies half of what they differ from their mean
        half = torch.sub(others[0], first, out=block.scratch[0]).mul_(0.5)
        return half.square_()
    total, step, mean = block.scratch[0], block.scratch[1], block.scratch[MEAN].zero_()
    for other in others:
        mean.add_(torch.sub(other, first, out=step), alpha=1.0 / k)
    torch.mul(mean, mean, out=total)
    for other in others:
        torch.sub(other, first, out=step).sub_(mean)
        total.addcmul_(step, step)
    return total.div_(k)


def _differing(block: Block) -> Tensor:
    """Count the places whose variance is not zero."""
    return count_ones(_variance(block, 0).gt_(0))


def _kept(block: Block, cut: Cut) -> Tensor:
    """Return (n,) ones where the variance is kept, else zeros, in scratch row 0."""
    variance = selection.keep(_variance(block, 0), cut, block.first_cell, block.cell)
    return variance.gt_(0)


def _squares(block: Block, cut: Cut | None) -> Tensor:
    """Return (cells, k): the sums of the squares of the deltas, where they are kept."""
    kept = None if cut is None else _kept(block, cut)

    def reduce(run: slice) -> list[Tensor]:
        return [exact(delta[run]).square_().sum()]

    columns = []
    for tuned in block.tuned:
        delta = torch.sub(tuned, block.base, out=block.scratch[1])
        if kept is not None:
            delta.mul_(kept)
        columns.append(by_cell(block.n, reduce, block.cell))
    return torch.cat(columns, dim=1)


def _shares(squares: list[float]) -> list[float]:
    """Return the models' weights from their mean squares."""
    total = math.fsum(squares)
    return [1.0 / len(squares)] * len(squares) if total < LEAST else [s / total for s in squares]
