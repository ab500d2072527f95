"""TIES-Merging (Yadav et al. 2023, arXiv:2306.01708, Algorithm 1).

For task vectors  d_t = theta_t - theta_0  of k tuned models:

    trim      d'_t   keeps the `density` largest |d_t|, tensor by tensor  (the paper: scope: model)
    elect     s      = sign(sum_t w_t d'_t), + where the sum is zero
    merge     d      = weighted mean of the d'_t whose sign is s  (normalize: false, weighted sum)
    return    theta_0 + lambda d
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ft.algebra import selection, signs
from mergekit_ft.algebra.cells import l1, l1_norms, restoring_factor, totals
from mergekit_ft.algebra.deltas import sole_model, subtract_base
from mergekit_ft.contract import (
    About,
    Block,
    Measure,
    Operator,
    Place,
    Share,
    Survey,
    per_model,
    setting,
    shared,
)


class Ties(Operator):
    """Trim the task vectors, elect a sign for each element, merge those that agree."""

    weight: tuple[float, ...] = per_model(description="factor of each task vector")
    density: tuple[Share, ...] = per_model(1.0, description="share of entries kept, 0 to 1")
    normalize: bool = shared(True, description="divide by the weights of the agreeing models")
    rescale: bool = shared(False, description="restore each trimmed delta's L1 norm")
    lambda_: float = shared(1.0, alias="lambda", description="factor of the merged delta")
    scope: Literal["tensor", "model"] = setting(
        "tensor", description="rank entries within a tensor, as mergekit, or within the whole model"
    )
    int8_mask: bool = shared(False, description="accepted for mergekit plans; changes no value")

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        """Return the scope within which entries are ranked."""
        return self.scope

    def scratch(self, k: int) -> int:
        """Return the rows that selection and election need."""
        return max(selection.scratch(k), signs.ROWS)

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where it is not trimmed and its factor is 1."""
        sole = sole_model(self.weight, self.normalize, self.lambda_)
        kept = sole is None or sole < 0 or self.density[sole] == 1.0
        return sole if kept else None

    def survey(self, about: About) -> Survey:
        """Find each model's cut and the factor that restores its norm."""
        k = len(about.ids)
        if all(share == 1.0 for share in self.density):
            return None
        counts = [selection.count_for(share, about.numel) for share in self.density]
        cuts = yield from selection.largest(counts, _delta, about)
        factors = [1.0] * k
        if self.rescale:
            (rows,) = yield (Measure(lambda block: self._norms(block, cuts), cells=True),)
            sums = totals(rows)
            factors = [restoring_factor(sums[2 * i], sums[2 * i + 1]) for i in range(k)]
        return cuts, factors

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        deltas = subtract_base(block.tuned, block.base)
        if finding is not None:
            for delta, cut, factor, share in zip(deltas, *finding, self.density, strict=True):
                _trim(delta, cut, block.first_cell, share)
                if factor != 1.0:
                    delta.mul_(factor)
        mix = signs.disjoint_merge(deltas, self.weight, self.normalize, block.scratch)
        return mix if self.lambda_ == 1.0 else mix.mul_(self.lambda_)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64; sorts, where `merge` counts."""
        trimmed = []
        for i, (share, x) in enumerate(zip(self.density, tuned, strict=True)):
            delta = (x - base).flatten()
            trimmed.append(self._reference_trim(delta, share, about, i))
        mix = signs.reference_disjoint_merge(trimmed, self.weight, self.normalize)
        return (self.lambda_ * mix).view_as(base)

    def same_everywhere(self) -> Any:
        """Return the densities where the whole model is ranked at once."""
        return self.density if self.scope == "model" else None

    def _norms(self, block: Block, cuts: Sequence[Any]) -> Tensor:
        return l1_norms(_whole_and_trimmed(block, cuts, self.density))

    def _reference_trim(self, delta: Tensor, share: float, about: About, i: int) -> Tensor:
        if about.finding is not None:  # ranked within the whole model, by the survey
            cuts, factors = about.finding
            return _trim(delta.clone(), cuts[i], about.first_cell, share).mul_(factors[i])
        count = selection.count_for(share, delta.numel())
        kept = selection.reference_keep(delta, count) * (share > 0.0)
        return kept * (restoring_factor(float(l1(delta)), float(l1(kept))) if self.rescale else 1.0)


def _delta(block: Block, i: int) -> Tensor:
    """Return (n,) the delta of model i, in the first row of scratch."""
    return torch.sub(block.tuned[i], block.base, out=block.scratch[0])


def _trim(delta: Tensor, cut: Any, first_cell: int, share: float) -> Tensor:
    """Set to zero, in place, what is not among the `share` largest."""
    if share == 0.0:
        return delta.zero_()
    return delta if cut is None else selection.keep(delta, selection.Cut(*cut), first_cell)


def _whole_and_trimmed(
    block: Block, cuts: Sequence[Any], densities: Sequence[float]
) -> Iterator[Tensor]:
    """Yield each model's delta, whole and then trimmed."""
    for i, (cut, share) in enumerate(zip(cuts, densities, strict=True)):
        yield (delta := _delta(block, i))
        yield _trim(delta, cut, block.first_cell, share)
