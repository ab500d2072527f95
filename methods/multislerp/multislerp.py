"""Multi-SLERP (Goddard et al. 2024, arXiv:2403.13257): a mean of directions on the sphere.

For k models with weights w_i, and y_i = theta_i - theta_0 where there is a base theta_0, else
y_i = theta_i, each tensor taken as one vector:

    n_i, u_i  = |y_i|, y_i / (n_i + eps)
    m         = sum_i w_i u_i, divided by its norm
    tau       = sum_i w_i (u_i - (u_i.m) m)                  the mean in the tangent space at m
    nu        = |tau| + eps
    y         = (cos(nu) m + sin(nu) / nu tau) sum_i w_i n_i
    theta     = theta_0 + y, or y

The point m is the weighted mean's own direction, so tau is zero but for rounding, and y is m times
the weighted mean of the norms. That is what `merge` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from mergekit_ft.algebra import gram
from mergekit_ft.contract import About, Base, Block, Operator, Place, Survey, per_model, shared


class Multislerp(Operator):
    """The mean direction of models, or of task vectors, with their mean norm."""

    base: ClassVar[Base] = Base.OPTIONAL

    weight: tuple[float, ...] = per_model(description="share of each model")
    normalize_weights: bool = shared(True, description="divide the weights by their sum")
    eps: float = shared(1e-8, ge=0, description="added to norms; a mean as short has no direction")

    @model_validator(mode="after")
    def _weights_do_not_cancel(self) -> Multislerp:
        if self.normalize_weights and abs(sum(self.weight)) < 1e-8:
            raise ValueError("the weights sum to zero, so they cannot be normalised")
        return self

    @property
    def shares(self) -> list[float]:
        """Return the weights, divided by their sum where asked; of one model 1."""
        if len(self.weight) == 1:
            return [1.0]
        total = sum(self.weight) if self.normalize_weights else 1.0
        return [weight / total for weight in self.weight]

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the only model, or the only one that is heard, where its share is 1."""
        heard = [i for i, share in enumerate(self.shares) if share != 0.0]
        alone = len(heard) == 1 and self.shares[heard[0]] == 1.0
        return 0 if k == 1 else heard[0] if alone else None

    def survey(self, about: About) -> Survey:
        """Find what each vector counts for in the mean, from their dot products."""
        k = len(self.weight)
        (rows,) = yield (gram.measure(),)
        found = gram.matrix(rows, k)
        norms, shares = np.sqrt(found.diagonal()), np.array(self.shares)
        lengths = norms + self.eps
        mean = shares / np.where(lengths > 0.0, lengths, 1.0)
        length = gram.norm(mean, found)
        if length <= self.eps:
            return self.shares
        return (mean * float((shares * norms).sum()) / length).tolist()

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta, or values where there is no base."""
        return gram.combine(gram.vectors(block), finding)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the same in float64, by the tangent space."""
        vectors = [x - base if about.based and base.numel() else x for x in tuned]
        weighted = list(zip(self.shares, vectors, strict=True))
        if len(vectors) == 1:
            return vectors[0]
        units = [x / ((x.norm() + self.eps) or 1.0) for x in vectors]
        mean = torch.stack([w * u for w, u in zip(self.shares, units, strict=True)]).sum(0)
        if mean.norm() <= self.eps:
            return torch.stack([w * x for w, x in weighted]).sum(0)
        mean = mean / mean.norm()
        along = [(u - (u * mean).sum() * mean) for u in units]
        tau = torch.stack([w * x for w, x in zip(self.shares, along, strict=True)]).sum(0)
        nu = tau.norm() + self.eps
        step = torch.sin(nu) / nu * tau if nu else tau
        norm = torch.stack([w * x.norm() for w, x in weighted]).sum()
        found: Tensor = (torch.cos(nu) * mean + step) * norm
        return found
