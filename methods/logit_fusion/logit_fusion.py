"""Fused logits put into weights, to first order (after Fan et al. 2024, arXiv:2406.15480).

With f the logits of a model and J their derivative at theta_0:

    fused     f(theta_0) + sum_t a_t (f(theta_t) - f(theta_0)),   a_t fitted (dynamic_logit_fusion)
    near      f(theta_t) - f(theta_0) = J tau_t,                  tau_t = theta_t - theta_0
    so        theta = theta_0 + sum_t a_t tau_t  says nearly the same
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_ft.algebra.deltas import sole_model, subtract_base, weighted_sum
from mergekit_ft.contract import About, Block, Operator, Place, per_model


class LogitFusion(Operator):
    """The base plus a weighted sum of task vectors."""

    weight: tuple[float, ...] = per_model(
        description="factor of each task vector; a plan's `calibration:` finds them"
    )

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where its factor is 1."""
        return sole_model(self.weight, False, 1.0)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        return weighted_sum(subtract_base(block.tuned, block.base), self.weight)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64."""
        pairs = zip(self.weight, tuned, strict=True)
        return sum((w * (x - base) for w, x in pairs), 0 * base)
