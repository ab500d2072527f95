"""Passthrough: one model as it is, or times a number.

    theta = scale theta_1

Stacked from slices it makes deeper models (Kim et al. 2023, arXiv:2312.15166, section 3); a scale
of 0 on what a layer adds to the residual stream takes the layer out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergekit_ft.contract import About, Base, Block, Operator, Place, per_model


class Passthrough(Operator):
    """One model as it is, or scaled."""

    base: ClassVar[Base] = Base.IGNORED
    tuned: ClassVar[tuple[int, int | None]] = (1, 1)
    yields_delta: ClassVar[bool] = False

    scale: tuple[float | None, ...] = per_model(None, description="what values are multiplied by")

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the model, where it is not scaled."""
        return 0 if self._factor == 1.0 else None

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the scaled values."""
        return block.tuned[0].mul_(self._factor)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the scaled values in float64."""
        return self._factor * tuned[0]

    @property
    def _factor(self) -> float:
        scale = self.scale[0]
        return 1.0 if scale is None else scale
