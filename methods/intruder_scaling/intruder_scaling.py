"""Scaling of intruder dimensions (Shuttleworth et al. 2024, arXiv:2410.21228, section 5).

    W <- W_0 + (W - W_0) + (lambda - 1) sum_i s_i u_i v_i^T

over the intruders i of W (see `intruder_dimensions`): the one of the largest singular value, as in
the paper, or all. 1 changes nothing, 0 takes them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ft.algebra.intruders import Leading, leading
from mergekit_ft.contract import About, Block, Grain, Operator, Place, shared
from mergekit_ft.layers import role_of


class IntruderScaling(Operator):
    """Scale what tuning added to a matrix in directions that its base has not."""

    tuned = (1, 1)

    lambda_: float = shared(0.75, alias="lambda", description="factor of the intruders' part")
    which: Literal["top", "all"] = shared("top", description="the largest intruder, or every one")
    k: int = shared(10, ge=1, description="singular vectors that are looked at")
    epsilon: float = shared(0.5, gt=0, le=1, description="nearest cosine below which one intrudes")
    transposed: bool = shared(False, description="matrices are stored (in, out), as in GPT-2")

    @property
    def grain(self) -> Grain:
        """Return that a matrix must be seen whole."""
        return Grain.TENSOR

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the model where nothing is scaled: beside the layers, in norms, at lambda 1."""
        inside = place.layer is not None and role_of(name) in ("other", "block")
        return None if inside and self.lambda_ != 1.0 else 0

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the delta, its intruders scaled."""
        delta = block.tuned[0].double() - block.base.double()
        if len(block.shape) in (2, 3) and min(block.shape[-2:]) > 1:
            base, tuned = (
                x.double().view(-1, *block.shape[-2:]) for x in (block.base, block.tuned[0])
            )
            for before, after, part in zip(base, tuned, delta.view_as(base), strict=True):
                self._scale(before, after, part)
        return block.tuned[0].copy_(delta)

    def _scale(self, base: Tensor, tuned: Tensor, delta: Tensor) -> None:
        """Add (lambda - 1) s u v^T of the intruders to a matrix's delta."""
        if self.transposed:
            base, tuned, delta = base.T, tuned.T, delta.T
        found = leading(base, tuned, self.k)
        sizes = found.s * self._chosen(found)
        delta.add_((found.u * sizes) @ found.v.T, alpha=self.lambda_ - 1.0)

    def _chosen(self, found: Leading) -> Tensor:
        """Return (k,) true for the intruders that are scaled."""
        intrudes = found.nearest < self.epsilon
        return intrudes & (intrudes.cumsum(0) == 1) if self.which == "top" else intrudes

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the delta in float64, by whole singular value decompositions."""
        delta = tuned[0] - base
        if base.dim() not in (2, 3) or min(base.shape[-2:]) < 2:
            return delta
        parts = []
        for before, after in zip(
            base.reshape(-1, *base.shape[-2:]), tuned[0].reshape(-1, *base.shape[-2:]), strict=True
        ):
            one, other = (before.T, after.T) if self.transposed else (before, after)
            u0 = torch.linalg.svd(one, full_matrices=False).U
            u, s, vh = torch.linalg.svd(other, full_matrices=False)
            near = (u0.T @ u[:, : self.k]).abs().amax(0)
            hits = (near < self.epsilon).nonzero().flatten().tolist()
            hits = hits[:1] if self.which == "top" else hits
            part = sum(
                ((self.lambda_ - 1.0) * s[j] * torch.outer(u[:, j], vh[j]) for j in hits),
                torch.zeros_like(one),
            )
            parts.append(part.T if self.transposed else part)
        return delta + torch.stack(parts).view_as(delta)
