"""Spherical linear interpolation (Shoemake 1985, "Animating rotation with quaternion curves").

For the base a and one model b, each tensor taken as one vector:

    cos(phi)  = a.b / (|a| |b|)
    theta     = sin((1-t) phi) / sin(phi) a + sin(t phi) / sin(phi) b

The unnormalised tensors are blended. Where |cos(phi)| > 0.9995 the arc is taken for a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_ft.algebra.cells import by_cell, exact, totals
from mergekit_ft.algebra.deltas import add_base, subtract_base
from mergekit_ft.algebra.spheres import arc_weights
from mergekit_ft.contract import About, Block, Measure, Operator, Place, Survey, shared


class Slerp(Operator):
    """Interpolation between two models along the arc of a great circle."""

    tuned: ClassVar[tuple[int, int | None]] = (1, 1)
    yields_delta: ClassVar[bool] = False

    t: float = shared(description="0: the base, 1: the other model; may lie outside")

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the end of the arc that t names."""
        return {0.0: -1, 1.0: 0}.get(self.t)

    def survey(self, about: About) -> Survey:
        """Find the weights of a and b from one pass over both."""
        (rows,) = yield (Measure(_products, cells=True),)
        a, b, ab = totals(rows)
        return arc_weights(self.t, (a, b), ab)

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the point at t; a line is a + t (b - a), so that equal models stay equal."""
        a, b = block.base, block.tuned[0]
        first, second, straight = finding
        if straight:
            return add_base(a, subtract_base(b, a).mul_(second))
        return b.mul_(second).add_(a, alpha=first)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the point at t in float64."""
        a, b = base.flatten(), tuned[0].flatten()
        squares = float(a @ a), float(b @ b)
        first, second, _ = arc_weights(self.t, squares, float(a @ b))
        return first * base + second * tuned[0]


def _products(block: Block) -> Tensor:
    """Return (cells, 3): a.a, b.b and a.b in float64."""

    def reduce(cell: slice) -> list[Tensor]:
        a, b = exact(block.base[cell]), exact(block.tuned[0, cell])
        return [torch.dot(a, a), torch.dot(b, b), torch.dot(a, b)]

    return by_cell(block.n, reduce)
