"""DELLA (Deep et al. 2024, arXiv:2406.11617, section 3) without its election.

For task vectors  d_t = theta_t - theta_0  of k tuned models, row by row of each matrix:

    rank       r_i    of |d_i| among the L of its row, 0 the smallest, of equals the first
    drop       m_i    ~ Bernoulli(p_i),  p_i = (density - epsilon) + 2 epsilon r_i / (L - 1)
    rescale    d'_t   = m_t d_t / p      (rescaling: norm, as mergekit: |d_t|_1 / |m_t d_t|_1)
    fuse       d      = sum_t w_t d'_t   (normalize: divided by sum_t w_t)
    return     theta_0 + lambda d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from mergekit_ft.algebra import magprune
from mergekit_ft.algebra.deltas import divisor, scaled, sole_model, weighted_sum
from mergekit_ft.contract import (
    About,
    Block,
    Grain,
    Operator,
    Place,
    Share,
    Survey,
    per_model,
    setting,
    shared,
)

Spread = Annotated[float, Field(ge=0, lt=0.5)]


class DellaLinear(Operator):
    """Drop small entries likelier than large ones, rescale, add them up."""

    weight: tuple[float, ...] = per_model(description="factor of each task vector")
    density: tuple[Share, ...] = per_model(1.0, description="mean share of entries kept, 0 to 1")
    epsilon: tuple[Spread, ...] = per_model(
        0.15, description="how much likelier the largest are kept; without effect at density 0, 1"
    )
    normalize: bool = shared(False, description="divide by the sum of the weights")
    rescale: bool = shared(True, description="make up for what was dropped")
    rescaling: Literal["norm", "probability"] = setting(
        "norm", description="restore the L1 norm, as mergekit, or divide by p, as the paper"
    )
    lambda_: float = shared(1.0, alias="lambda", description="factor of the merged delta")
    seed: int = setting(0, ge=0, description="key of the random masks")
    int8_mask: bool = shared(False, description="accepted for mergekit plans; changes no value")

    @model_validator(mode="after")
    def _check(self) -> DellaLinear:
        self._prune.require_probabilities()
        return self

    @property
    def _prune(self) -> magprune.MagPrune:
        return magprune.MagPrune(
            self.density, self.epsilon, self.seed, self.rescale, self.rescaling
        )

    @property
    def grain(self) -> Grain:
        """Return whole rows, where entries are ranked within them."""
        return self._prune.grain

    def scratch(self, k: int) -> int:
        """Return the rows that ranks and masks need."""
        return magprune.ROWS

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where it is not dropped from and its factor is 1."""
        sole = sole_model(self.weight, self.normalize, self.lambda_)
        kept = sole is None or sole < 0 or self.density[sole] == 1.0
        return sole if kept else None

    def survey(self, about: About) -> Survey:
        """Find each model's rescaling factor, where it is by norm."""
        return self._prune.survey(about)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        total = weighted_sum(self._prune.apply(block, finding), self.weight)
        return scaled(total, self.weight, self.normalize, self.lambda_)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64, with the same masks."""
        pairs = zip(self.weight, self._prune.reference(base, tuned, about), strict=True)
        total = sum((w * delta for w, delta in pairs), 0 * base)
        return self.lambda_ * total / (divisor(self.weight) if self.normalize else 1.0)
