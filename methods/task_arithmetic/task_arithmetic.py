"""Task arithmetic (Ilharco et al. 2022, arXiv:2212.04089, section 2).

task vector      tau_i = theta_i - theta_0
sum              tau   = sum_i w_i tau_i          (normalize: divided by sum_i w_i)
return           theta_0 + lambda tau
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergekit_ft.algebra.deltas import (
    divisor,
    scaled,
    sole_model,
    subtract_base,
    weighted_sum,
)
from mergekit_ft.contract import About, Block, Operator, Place, per_model, shared


class TaskArithmetic(Operator):
    """The base plus a weighted sum of task vectors."""

    without_effect: ClassVar[Mapping[str, str]] = {
        "density": "it drops nothing (ties, breadcrumbs, dare_linear and della_linear do)",
        "rescale": "it drops nothing that could be made up for",
    }

    weight: tuple[float, ...] = per_model(description="factor of each task vector")
    normalize: bool = shared(False, description="divide by the sum of the weights")
    lambda_: float = shared(1.0, alias="lambda", description="factor of the merged delta")
    int8_mask: bool = shared(False, description="accepted for mergekit plans; changes no value")

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where its factor is 1."""
        return sole_model(self.weight, self.normalize, self.lambda_)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        total = weighted_sum(subtract_base(block.tuned, block.base), self.weight)
        return scaled(total, self.weight, self.normalize, self.lambda_)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64."""
        pairs = zip(self.weight, tuned, strict=True)
        total = sum((w * (x - base) for w, x in pairs), 0 * base)
        return self.lambda_ * total / (divisor(self.weight) if self.normalize else 1.0)
