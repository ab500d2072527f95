"""Linear merging, or model soup (Wortsman et al. 2022, arXiv:2203.05482, section 2).

For models theta_1 .. theta_k with weights w_i, W = sum_i w_i:

    normalize        theta = sum_i w_i theta_i / W
                           = theta_1 + sum_i (w_i / W) (theta_i - theta_1)
    no normalize     theta = sum_i w_i theta_i

The second line of the first form is the one computed: equal models come out bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from mergekit_ft.algebra.deltas import subtract_weighted, weighted_sum
from mergekit_ft.contract import About, Base, Block, Operator, Place, per_model, shared


class Linear(Operator):
    """The weighted average of models."""

    base: ClassVar[Base] = Base.IGNORED
    yields_delta: ClassVar[bool] = False

    weight: tuple[float, ...] = per_model(description="share of each model")
    normalize: bool = shared(True, description="divide by the sum of the weights")

    @model_validator(mode="after")
    def _weights_do_not_cancel(self) -> Linear:
        if self.normalize and abs(sum(self.weight)) < 1e-8:
            raise ValueError("the weights sum to zero, so they cannot be normalised")
        return self

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where its share is 1."""
        heard = [i for i in range(k) if self.weight[i] != 0.0]
        alone = len(heard) == 1 and (self.normalize or self.weight[heard[0]] == 1.0)
        return heard[0] if alone else None

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the average."""
        if not self.normalize:
            return weighted_sum(block.tuned, self.weight)
        first, others = block.tuned[0], block.tuned[1:]
        total = sum(self.weight)
        shares = [weight / total for weight in self.weight[1:]]
        return subtract_weighted(first, torch.sub(first, others, out=others), shares)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the average in float64."""
        total = sum((w * x for w, x in zip(self.weight, tuned, strict=True)), 0 * tuned[0])
        return total / sum(self.weight) if self.normalize else total
