"""Composition of sparse fine-tunings (Ansell et al. 2022, arXiv:2110.07560).

sparse difference   phi_i = theta_i - theta_0   zero but at the entries that fine-tuning i changed
composition         theta = theta_0 + sum_i w_i phi_i      (the paper: phi_task + phi_language)

The sum is taken in the order of the models' names, so that the plan's order moves no bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergekit_ft.algebra.deltas import sole_model, subtract_base
from mergekit_ft.contract import About, Block, Operator, Place, per_model


class SparseCompose(Operator):
    """The base plus a weighted sum of sparse deltas, in no order."""

    without_effect: ClassVar[Mapping[str, str]] = {
        "density": "it keeps what the deltas hold (`mergekit-ft delta extract` chooses that)",
    }

    weight: tuple[float, ...] = per_model(description="factor of each delta")

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the one model that is heard, where its factor is 1."""
        return sole_model(self.weight, False, 1.0)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the sum of the deltas."""
        deltas = subtract_base(block.tuned, block.base)
        first, *rest = _order(block.ids, self.weight)
        total = deltas[first].mul_(self.weight[first])
        for i in rest:
            total.add_(deltas[i], alpha=self.weight[i])
        return total

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the sum in float64."""
        pairs = zip(self.weight, tuned, strict=True)
        return sum((w * (x - base) for w, x in pairs), 0 * base)


def _order(ids: Sequence[str], weight: Sequence[float]) -> list[int]:
    """Return the models from the first name to the last; of one name, from the least weight."""
    return sorted(range(len(ids)), key=lambda i: (ids[i], weight[i]))
