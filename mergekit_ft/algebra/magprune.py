"""MagPrune (DELLA, Deep et al. 2024, arXiv:2406.11617): the larger an entry the likelier it stays.

Within a row of L entries the one of rank r (0: the smallest) stays with probability
(density - epsilon) + 2 epsilon r / (L - 1), kept as a whole number of 2^-31, as random bits are.
Ranking costs most, so a survey keeps the masks it made, one bit an entry, where there is room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ft.algebra import ranks
from mergekit_ft.algebra.cells import l1, l1_norms, restoring_factor, totals
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.algebra.masks import Masks, apply
from mergekit_ft.algebra.randomness import ONE, keep_where, key_of
from mergekit_ft.contract import About, Block, Grain, Measure, Survey, row_of

ROWS = 1 + ranks.ROWS  # of scratch: a delta, and what ranks it


class Found(NamedTuple):
    """What a survey finds."""

    factors: Sequence[float]  # (k,) restore the norms
    masks: Masks


class MagPrune(NamedTuple):
    """What is dropped of each model's delta, and how the rest makes up for it."""

    density: Sequence[float]  # (k,) share kept
    epsilon: Sequence[float]  # (k,) how much likelier than that the largest are kept
    seed: int
    rescale: bool
    rescaling: str  # "norm" or "probability"

    @property
    def grain(self) -> Grain:
        """Return whole rows, where any entry is dropped at random."""
        return Grain.ROW if any(0.0 < p < 1.0 for p in self.density) else Grain.ELEMENT

    def require_probabilities(self) -> None:
        """Refuse what would give an entry no chance, or certainty."""
        for p, width in zip(self.density, self.epsilon, strict=True):
            if 0.0 < p < 1.0 and not 0.0 < p - width <= p + width < 1.0:
                raise ValueError(
                    f"density {p:g} with epsilon {width:g} keeps entries with probabilities from "
                    f"{p - width:g} to {p + width:g}, which must lie between 0 and 1; give epsilon "
                    f"less than {min(p, 1.0 - p):g}"
                )

    def survey(self, about: About) -> Survey:
        """Find the factor of what is kept, by norm: |d|_1 / |kept d|_1."""
        if not self._by_norm or all(p == 1.0 for p in self.density):
            return None
        masks = Masks(len(self.density), about)
        (rows,) = yield (Measure(lambda block: self._norms(block, masks), cells=True),)
        sums = totals(rows)
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return Found([restoring_factor(whole, kept) for whole, kept in pairs], masks)

    def apply(self, block: Block, found: Found | None) -> Tensor:
        """Return (k, n) the sparse deltas in the memory of the tuned values."""
        factors, masks = found if found is not None else ([1.0] * len(self.density), None)
        deltas = subtract_base(block.tuned, block.base)
        for i, delta in enumerate(deltas):
            mask = masks.kept(block, i) if masks is not None else None
            if mask is None:
                self._drop(delta, block, i)
            else:
                apply(mask, delta)
            if factors[i] != 1.0:
                delta.mul_(factors[i])
        return deltas

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> list[Tensor]:
        """Return the sparse deltas in float64, with the same masks."""
        kept = []
        for i, x in enumerate(tuned):
            delta = x - base
            sparse = delta * self._reference_mask(delta, about, i)
            by_norm = self._by_norm and self.density[i] < 1.0
            factor = restoring_factor(float(l1(delta)), float(l1(sparse))) if by_norm else 1.0
            kept.append(sparse * factor)
        return kept

    @property
    def _by_norm(self) -> bool:
        return self.rescale and self.rescaling == "norm"

    @property
    def _by_probability(self) -> bool:
        return self.rescale and self.rescaling == "probability"

    def _drop(self, delta: Tensor, block: Block, i: int, masks: Masks | None = None) -> None:
        """Set to zero, in place, what chance drops of a model's delta; rescale by probability."""
        if self.density[i] == 0.0:
            delta.zero_()
        elif self.density[i] < 1.0:
            length, rows = row_of(block.shape), block.scratch[1 : 1 + ranks.ROWS]
            order = ranks.ascending(delta, length, rows)
            chances = self._chances(i, length, delta)
            limits = rows[0].view(torch.int32)[: block.n]
            limits.view(-1, length).scatter_(1, order, chances.expand_as(order))
            if self._by_probability:
                inverse = chances.to(delta.dtype).div_(ONE).reciprocal_().expand_as(order)
                delta.mul_(rows[3].view(-1, length).scatter_(1, order, inverse).flatten())
            key = key_of(self.seed, block.ids[i], block.name)
            mask = keep_where(key, block.start, limits)
            delta.mul_(mask)
            if masks is not None and mask.device.type == "cpu":
                masks.keep(block, i, mask.numpy())

    def _chances(self, i: int, length: int, like: Tensor) -> Tensor:
        """Return (length,) how likely the entry of each rank is kept, in 2^-31."""
        least = round((self.density[i] - self.epsilon[i]) * ONE)
        span = round(2.0 * self.epsilon[i] * ONE)
        if length == 1:
            least, span = least + span // 2, 0
        rank = torch.arange(length, dtype=torch.int64, device=like.device)
        rank.mul_(span).div_(max(1, length - 1), rounding_mode="floor").add_(least)
        return rank.clamp_(max=ONE - 1).to(torch.int32)

    def _reference_mask(self, delta: Tensor, about: About, i: int) -> Tensor:
        """Return what each entry is multiplied by: 0, 1, or 1 / its probability."""
        if self.density[i] in (0.0, 1.0):
            return torch.full_like(delta, self.density[i])
        length = row_of(tuple(delta.shape))
        rows = delta.abs().view(-1, length)
        rank = rows.sort(dim=1, stable=True).indices.argsort(dim=1)
        chances = self._chances(i, length, delta)[rank].flatten()
        key = key_of(self.seed, about.ids[i], about.name)
        mask = keep_where(key, 0, chances).to(delta)
        return (mask * ONE / chances if self._by_probability else mask).view_as(delta)

    def _norms(self, block: Block, masks: Masks) -> Tensor:
        return l1_norms(self._whole_and_kept(block, masks), block.cell)

    def _whole_and_kept(self, block: Block, masks: Masks) -> Iterator[Tensor]:
        for i in range(len(self.density)):
            yield (delta := torch.sub(block.tuned[i], block.base, out=block.scratch[0]))
            self._drop(delta, block, i, masks)
            yield delta
