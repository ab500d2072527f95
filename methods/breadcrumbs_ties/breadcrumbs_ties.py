"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795) with TIES' election.

For task vectors  d_t = theta_t - theta_0  of k tuned models, tensor by tensor:

    mask       d'_t   is d_t without its `gamma` largest magnitudes and without the smallest,
                      so that `density` of its entries stay
    elect      s      = sign(sum_t w_t d'_t), + where the sum is zero  (arXiv:2306.01708)
    sum        d      = sum of the w_t d'_t whose sign is s  (normalize: divided by their w_t)
    return     theta_0 + lambda d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_ft.algebra import outliers, signs
from mergekit_ft.algebra.deltas import sole_model
from mergekit_ft.contract import About, Block, Operator, Place, Share, Survey, per_model, shared


class BreadcrumbsTies(Operator):
    """Drop each task vector's largest and smallest entries, merge those whose sign is elected."""

    weight: tuple[float, ...] = per_model(description="factor of each task vector")
    density: tuple[Share, ...] = per_model(1.0, description="share of entries kept, 0 to 1")
    gamma: tuple[Share, ...] = per_model(
        0.01, description="share of entries, the largest, that go; without effect at density 1"
    )
    normalize: bool = shared(False, description="divide by the sum of the weights that are heard")
    rescale: bool = shared(False, description="restore each sparse delta's L1 norm")
    lambda_: float = shared(1.0, alias="lambda", description="factor of the merged delta")
    int8_mask: bool = shared(False, description="accepted for mergekit plans; changes no value")

    @property
    def _outliers(self) -> outliers.Outliers:
        return outliers.Outliers(self.density, self.gamma, self.rescale)

    def scratch(self, k: int) -> int:
        """Return the rows that selection and election need."""
        return max(outliers.scratch(k), signs.ROWS)

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where nothing of it goes and its factor is 1."""
        sole = sole_model(self.weight, self.normalize, self.lambda_)
        kept = sole is None or sole < 0 or self.density[sole] == 1.0
        return sole if kept else None

    def survey(self, about: About) -> Survey:
        """Find the band of magnitudes of each model that stays."""
        return self._outliers.survey(about)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        deltas = self._outliers.apply(block, finding)
        mix = signs.disjoint_merge(deltas, self.weight, self.normalize, block.scratch)
        return mix if self.lambda_ == 1.0 else mix.mul_(self.lambda_)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64; sorts, where `merge` counts."""
        deltas = self._outliers.reference(base, tuned)
        return self.lambda_ * signs.reference_disjoint_merge(deltas, self.weight, self.normalize)
