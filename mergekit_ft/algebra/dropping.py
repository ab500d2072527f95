"""Drop and rescale (DARE, Yu et al. 2023, arXiv:2311.03099, section 3): random sparse deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ft.algebra.cells import added, l1, restoring_factor, totals
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.algebra.masks import Masks, apply
from mergekit_ft.algebra.randomness import Bits, keep_mask, key_of
from mergekit_ft.contract import About, Block, Measure, Survey


def scratch(k: int) -> int:
    """Return the rows that k deltas and the bytes of a mask take."""
    return k + 1


class Found(NamedTuple):
    """What a survey finds."""

    factors: Sequence[float]  # (k,) restore the norms
    masks: Masks


class Drop(NamedTuple):
    """What is dropped of each model's delta, and how the rest makes up for it."""

    density: Sequence[float]  # (k,) share kept
    seed: int
    rescale: bool
    rescaling: str  # "norm" or "density"

    def survey(self, about: About) -> Survey:
        """Find the factor of what is kept, by norm: |d|_1 / |kept d|_1."""
        if not self.rescale or self.rescaling != "norm" or all(p == 1.0 for p in self.density):
            return None
        masks = Masks(len(self.density), about)
        (rows,) = yield (Measure(lambda block: self._norms(block, masks), cells=True),)
        norms, k = totals(rows), len(self.density)
        pairs = zip(norms[:k], norms[k:], strict=True)
        return Found([restoring_factor(whole, kept) for whole, kept in pairs], masks)

    def apply(self, block: Block, found: Found | None) -> tuple[Tensor, list[float]]:
        """Return (k, n) the deltas less what is dropped, in the memory of the tuned values.

        And (k,) what each has to be multiplied by to make up for that.
        """
        factors, masks = found if found is not None else (None, None)
        deltas = subtract_base(block.tuned, block.base)
        for i, delta in enumerate(deltas):
            self._drop(delta, block, i, masks)
        return deltas, [self._factor(i, factors) for i in range(len(deltas))]

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> list[Tensor]:
        """Return the sparse deltas in float64, with the same masks."""
        kept = []
        for i, x in enumerate(tuned):
            delta = x - base
            sparse = delta * self._whole_mask(about, i, delta)
            by_norm = self.rescale and self.rescaling == "norm" and self.density[i] < 1.0
            factors = (
                {i: restoring_factor(float(l1(delta)), float(l1(sparse)))} if by_norm else None
            )
            kept.append(sparse * self._factor(i, factors))
        return kept

    def _whole_mask(self, about: About, i: int, like: Tensor) -> Tensor:
        if self.density[i] in (0.0, 1.0):
            return torch.full_like(like, self.density[i])
        key = key_of(self.seed, about.ids[i], about.name)
        mask = keep_mask(key, 0, like.numel(), self.density[i])
        return torch.from_numpy(mask).view_as(like)

    def _drop(self, delta: Tensor, block: Block, i: int, masks: Masks | None) -> None:
        """Set to zero, in place, what chance drops of a model's delta."""
        if self.density[i] == 0.0:
            delta.zero_()
        elif self.density[i] < 1.0:
            mask = masks.kept(block, i) if masks is not None else None
            apply(self._mask(block, i, masks) if mask is None else mask, delta)

    def _mask(self, block: Block, i: int, masks: Masks | None) -> Bits:
        """Return (n,) ones and zeros, and keep them where there is room."""
        key = key_of(self.seed, block.ids[i], block.name)
        mask = keep_mask(key, block.start, block.n, self.density[i])
        if masks is not None:
            masks.keep(block, i, mask)
        return mask

    def _factor(self, i: int, factors: Sequence[float] | dict[int, float] | None) -> float:
        if factors is not None:
            return factors[i]
        return 1.0 / self.density[i] if self.rescale and self.density[i] > 0.0 else 1.0

    def _norms(self, block: Block, masks: Masks) -> Tensor:
        """Return (cells, 2k): the L1 norms of the deltas, whole and then sparse."""
        sizes = block.scratch[: len(block.tuned)]
        whole = added(torch.sub(block.tuned, block.base, out=sizes).abs_())
        for i, row in enumerate(sizes):
            self._drop(row, block, i, masks)
        return torch.cat([whole, added(sizes)]).T
