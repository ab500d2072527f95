"""Outliers of both kinds (Model Breadcrumbs, Davari and Belilovsky 2023, arXiv:2312.06795).

Of the magnitudes of a delta the largest go, and the smallest: a band of ranks stays. Its two edges
are two cuts, so a band is what the outer cut keeps less what the inner one keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ft.algebra import selection
from mergekit_ft.algebra.cells import l1, l1_norms, restoring_factor, totals
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.algebra.selection import Cut
from mergekit_ft.contract import About, Block, Measure, Survey


class Band(NamedTuple):
    """Which entries of a delta stay: those of the outer cut that are not of the inner one."""

    inner: Cut | None  # None: no large entry goes
    outer: Cut | None  # None: no small entry goes
    empty: bool  # none stays


def ranks_kept(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """Return the ranks that stay, from and to, where 0 is the largest of `numel` magnitudes.

    As many as the density says stay, however many large ones `gamma` would take away.
    """
    if density == 1.0:
        return 0, numel
    kept = math.trunc(density * numel)
    large = min(math.trunc(gamma * numel), numel - kept)
    return large, large + kept


def scratch(k: int) -> int:
    """Return the rows that two cuts for each of k models take."""
    return selection.scratch(2 * k)


class Outliers(NamedTuple):
    """What stays of each model's delta, and whether the rest makes up for what goes."""

    density: Sequence[float]  # (k,) share that stays
    gamma: Sequence[float]  # (k,) share of large ones that go
    rescale: bool

    def survey(self, about: About) -> Survey:
        """Find each model's band and the factor that restores its norm."""
        if all(share == 1.0 for share in self.density):
            return None
        bands = yield from self._bands(about)
        factors = [1.0] * len(bands)
        if self.rescale:
            (rows,) = yield (Measure(lambda block: _norms(block, bands), cells=True),)
            sums = totals(rows)
            factors = [restoring_factor(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        return bands, factors

    def apply(self, block: Block, finding: tuple[list[Band], list[float]] | None) -> Tensor:
        """Return (k, n) the sparse deltas in the memory of the tuned values."""
        deltas = subtract_base(block.tuned, block.base)
        if finding is not None:
            for delta, band, factor in zip(deltas, *finding, strict=True):
                _keep(delta, band, block)
                if factor != 1.0:
                    delta.mul_(factor)
        return deltas

    def reference(self, base: Tensor, tuned: Sequence[Tensor]) -> list[Tensor]:
        """Return the sparse deltas in float64, by sorting."""
        kept = []
        for x, density, gamma in zip(tuned, self.density, self.gamma, strict=True):
            delta = (x - base).flatten()
            start, stop = ranks_kept(density, gamma, delta.numel())
            order = delta.abs().sort(descending=True, stable=True).indices[start:stop]
            sparse = torch.zeros_like(delta)
            sparse[order] = delta[order]
            factor = restoring_factor(float(l1(delta)), float(l1(sparse))) if self.rescale else 1.0
            kept.append((sparse * factor).view_as(base))
        return kept

    def _bands(self, about: About) -> Survey:
        """Find the two cuts of each model, all in the same passes."""
        pairs = zip(self.density, self.gamma, strict=True)
        ranks = [ranks_kept(density, gamma, about.numel) for density, gamma in pairs]
        counts = [None if edge in (0, about.numel) else edge for pair in ranks for edge in pair]
        cuts = yield from selection.largest(counts, _delta, about, each=2)
        edges = zip(cuts[::2], cuts[1::2], ranks, strict=True)
        return [Band(inner, outer, start == stop) for inner, outer, (start, stop) in edges]


def _delta(block: Block, i: int) -> Tensor:
    """Return (n,) the delta of a model, in the first row of scratch."""
    return torch.sub(block.tuned[i], block.base, out=block.scratch[0])


def _keep(delta: Tensor, band: Band, block: Block) -> Tensor:
    """Set to zero, in place, what is outside the band."""
    if band.empty:
        return delta.zero_()
    large = block.scratch[1]
    if band.inner is not None:
        selection.keep(large.copy_(delta), band.inner, block.first_cell, block.cell)
    if band.outer is not None:
        selection.keep(delta, band.outer, block.first_cell, block.cell)
    return delta if band.inner is None else delta.sub_(large)


def _norms(block: Block, bands: Sequence[Band]) -> Tensor:
    return l1_norms(_whole_and_kept(block, bands), block.cell)


def _whole_and_kept(block: Block, bands: Sequence[Band]) -> Iterator[Tensor]:
    """Yield each model's delta, whole and then sparse."""
    for i, band in enumerate(bands):
        yield (delta := torch.sub(block.tuned[i], block.base, out=block.scratch[0]))
        yield _keep(delta, band, block)
