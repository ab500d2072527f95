"""DARE (Yu et al. 2023, arXiv:2311.03099, section 3; with TIES' election, arXiv:2306.01708).

For task vectors  d_t = theta_t - theta_0  of k tuned models, density p:

    drop       m_t    ~ Bernoulli(p), element by element, keyed by (seed, model, tensor, element)
    rescale    d'_t   = m_t d_t / p      (rescaling: norm, as mergekit: |d_t|_1 / |m_t d_t|_1)
    elect      s      = sign(sum_t w_t d'_t), + where the sum is zero
    fuse       d      = sum of the w_t d'_t whose sign is s  (normalize: divided by their w_t)
    return     theta_0 + lambda d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from mergekit_ft.algebra import dropping, signs
from mergekit_ft.algebra.deltas import sole_model
from mergekit_ft.contract import (
    About,
    Block,
    Operator,
    Place,
    Share,
    Survey,
    per_model,
    setting,
    shared,
)


class DareTies(Operator):
    """drop random entries, rescale the rest, merge those whose sign is elected."""

    weight: tuple[float, ...] = per_model(description="factor of each task vector")
    density: tuple[Share, ...] = per_model(1.0, description="share of entries kept, 0 to 1")
    normalize: bool = shared(False, description="divide by the sum of the weights that are heard")
    rescale: bool = shared(True, description="make up for what was dropped")
    rescaling: Literal["norm", "density"] = setting(
        "norm", description="restore the L1 norm, as mergekit, or divide by density, as the paper"
    )
    lambda_: float = shared(1.0, alias="lambda", description="factor of the merged delta")
    seed: int = setting(0, ge=0, description="key of the random masks")
    int8_mask: bool = shared(False, description="accepted for mergekit plans; changes no value")

    @property
    def _drop(self) -> dropping.Drop:
        return dropping.Drop(self.density, self.seed, self.rescale, self.rescaling)

    def scratch(self, k: int) -> int:
        """Return the rows that masks and election need."""
        return max(dropping.scratch(k), signs.ROWS)

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where it is not dropped from and its factor is 1."""
        sole = sole_model(self.weight, self.normalize, self.lambda_)
        kept = sole is None or sole < 0 or self.density[sole] == 1.0
        return sole if kept else None

    def survey(self, about: About) -> Survey:
        """Find each model's rescaling factor, where it is by norm."""
        return self._drop.survey(about)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        deltas, factors = self._drop.apply(block, finding)
        for delta, factor, weight in zip(deltas, factors, self.weight, strict=True):
            delta.mul_(factor * weight)
        mix = signs.merge_weighted(deltas, self.weight, self.normalize, block.scratch)
        return mix if self.lambda_ == 1.0 else mix.mul_(self.lambda_)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64, with the same masks."""
        deltas = self._drop.reference(base, tuned, about)
        return self.lambda_ * signs.reference_disjoint_merge(deltas, self.weight, self.normalize)
