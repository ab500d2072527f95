"""NuSLERP (Goddard et al. 2024, arXiv:2403.13257): SLERP with weights, of models or task vectors.

For two models with weights w_1 and w_2, and a_i = theta_i - theta_0 where there is a base theta_0,
else a_i = theta_i, each tensor (or each row, or column) taken as one vector:

    t         = w_2 / (w_1 + w_2), 1/2 where the weights cancel
    cos(phi)  = a_1.a_2 / (|a_1| |a_2|)
    a         = sin((1-t) phi) / sin(phi) a_1 + sin(t phi) / sin(phi) a_2
    theta     = theta_0 + a, or a

The unnormalised vectors are blended. Parallel ones, or opposite ones, are joined by a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_ft.algebra import gram
from mergekit_ft.algebra.cells import exact
from mergekit_ft.contract import (
    CELL,
    About,
    Base,
    Block,
    Grain,
    Operator,
    Place,
    Survey,
    per_model,
    row_of,
    shared,
)

SHORTEST = 1e-7  # a norm is taken for at least this
STRAIGHT = 1e-12  # up to this sin(phi)^2, well above its rounding, the arc is taken for a line


class Nuslerp(Operator):
    """Interpolation between two models, or task vectors, along the arc between them."""

    base: ClassVar[Base] = Base.OPTIONAL
    tuned: ClassVar[tuple[int, int | None]] = (2, 2)

    weight: tuple[float, ...] = per_model(description="share of each of the two models")
    nuslerp_row_wise: bool = shared(
        False, description="unless flattened: vectors along the first axis, not the last"
    )
    nuslerp_flatten: bool = shared(True, description="take each tensor for one vector")

    @property
    def t(self) -> float:
        """Return the place on the arc: 0 the first model, 1 the second."""
        total = sum(self.weight)
        return 0.5 if abs(total) < 1e-6 else self.weight[1] / total

    @property
    def grain(self) -> Grain:
        """Return whole rows where those are the vectors, and all of it where columns are."""
        if self.nuslerp_flatten:
            return Grain.ELEMENT
        return Grain.TENSOR if self.nuslerp_row_wise else Grain.ROW

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the end of the arc that the weights name."""
        return {0.0: 0, 1.0: 1}.get(self.t)

    def survey(self, about: About) -> Survey:
        """Find the weights of the two vectors, where a tensor is one, from one pass."""
        if not self.nuslerp_flatten:
            return None
        (rows,) = yield (gram.measure(),)
        (aa, ab), (_, bb) = gram.matrix(rows, 2)
        products = torch.tensor([[aa], [ab], [bb]], dtype=torch.float64)
        return [float(weight) for weight in _arc(self.t, products)]

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the point at t."""
        rows = gram.vectors(block)
        if finding is not None:
            return gram.combine(rows, finding)
        one, other = (self._vectors(row, block.shape) for row in rows)
        step = max(1, CELL // one.shape[1])
        for start in range(0, one.shape[0], step):
            self._blend(one[start : start + step], other[start : start + step])
        return rows[0]

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the point at t in float64."""
        one, other = (x - base if about.based and base.numel() else x for x in tuned)
        a, b = one.reshape(1, -1), other.reshape(1, -1)
        if not self.nuslerp_flatten:
            a, b = (self._vectors(x.contiguous(), about.shape) for x in (one, other))
        first, second = _arc(self.t, torch.stack([(a * a), (a * b), (b * b)]).sum(-1))
        blended = first[:, None] * a + second[:, None] * b
        columns = self.nuslerp_row_wise and not self.nuslerp_flatten
        return (blended.T if columns else blended).reshape(one.shape)

    def _vectors(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return (m, length) a view of the vectors that are blended each for itself."""
        if self.nuslerp_row_wise:
            return values.view(shape[0] if shape else 1, -1).T
        return values.view(-1, row_of(shape))

    def _blend(self, a: Tensor, b: Tensor) -> None:
        """Turn (m, length) vectors a, in place, into the points at t between them and b.

        In float64, for nearly opposite vectors have large weights. Computed as (first + second) a -
        second (a - b): equal vectors come out bit for bit, for what is taken away is +0.
        """
        one, other = exact(a), exact(b)
        first, second = (x.unsqueeze(-1) for x in _arc(self.t, gram.row_products([one, other])))
        total = first + second
        total.masked_fill_((total - 1.0).abs() <= gram.ONE, 1.0)
        a.copy_(one.mul(total).sub_((one - other).mul_(second).add_(0.0)))


def _arc(t: float, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return (m,) the weights at t of m pairs of vectors, from (3, m) a.a, a.b and b.b."""
    aa, ab, bb = products.unbind()
    norms = aa.sqrt().clamp_(min=SHORTEST) * bb.sqrt().clamp_(min=SHORTEST)
    cosine = (ab / norms).clamp_(-1.0, 1.0)
    line = (1.0 - cosine * cosine <= STRAIGHT) | ((aa == ab) & (bb == ab))
    angle = torch.acos(cosine).masked_fill_(line, 1.0)
    sine = torch.sin(angle)
    first = torch.where(line, 1.0 - t, torch.sin((1.0 - t) * angle) / sine)
    return first, torch.where(line, t, torch.sin(t * angle) / sine)
