"""NearSwap (Alchemonaut 2024): the base moved towards another model where the two are near.

For the base a and a model b, element by element:

    w      = t / |b - a|, clipped to [0, 1]        |b - a| taken for 1e-6 where it is smaller
    theta  = (1 - w) a + w b

That is a step from a towards b of at most t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_ft.algebra.choice import bits_of, choose
from mergekit_ft.algebra.deltas import add_base
from mergekit_ft.contract import About, Block, Operator, Place, shared

NEAREST = 1e-6  # a distance is taken for at least this


class Nearswap(Operator):
    """The base moved towards another model, by at most t in each element."""

    tuned: ClassVar[tuple[int, int | None]] = (1, 1)
    yields_delta: ClassVar[bool] = False

    t: float = shared(description="largest step of an element; 0 or less: the base")

    def scratch(self, k: int) -> int:
        """Return the rows for the distance, the step, and whether it reaches."""
        return 3

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the base, where no step is allowed."""
        return -1 if self.t <= 0.0 else None

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the values; b's own where the step reaches it."""
        a, b = block.base, block.tuned[0]
        step = torch.sub(b, a, out=block.scratch[0])
        distance = torch.abs(step, out=block.scratch[1])
        reached = bits_of(block.scratch[2])
        torch.le(distance, self.t if self.t >= NEAREST else 0.0, out=reached)
        step.mul_(min(1.0, self.t / NEAREST)).clamp_(-max(self.t, 0.0), max(self.t, 0.0))
        return choose(reached, b, add_base(a, step), distance)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the values in float64, by the weights."""
        w = (self.t / (tuned[0] - base).abs().clamp(min=NEAREST)).clamp(0.0, 1.0)
        return (1.0 - w) * base + w * tuned[0]
