"""Supervised fine-tuning as implicit reward learning, by f-divergence (derived).

With the implicit reward of a token, beta l_t, where l_t = log p_t - log p_ref,t:

    L = -(1/N) sum_t w_t phi(beta l_t)

    total_variation    phi(r) = r                  likelihood training, up to scale
    pearson            phi(r) = r - r^2 / 4        stops at r = 2
    hellinger          phi(r) = r / (1 + r)        r > -1
    reverse_kl         phi(r) = -exp(-(r + 1))
    jensen_shannon     phi(r) = log(2 - exp(-r))   exp(-r) < 2

The view is that of arXiv:2507.00018; these losses were derived by us from it, token by token and
without a value offset, and are not the paper's published code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ft.learning import Objective, Said

Divergence = Literal["total_variation", "pearson", "hellinger", "reverse_kl", "jensen_shannon"]
NEAR = 1e-3  # how near a reward may come to where phi has no value


class FSft(Objective):
    """Likelihood shaped by an f-divergence."""

    reference: ClassVar[bool] = True

    divergence: Divergence = Field("pearson", description="which phi")
    beta: float = Field(0.1, gt=0, description="scale of the implicit reward; ours")

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        assert said.reference is not None
        before = -torch.nn.functional.cross_entropy(said.reference, said.targets, reduction="none")
        return -(said.weights * self._phi(self.beta * (said.log_probabilities() - before))).sum()

    def _phi(self, r: Tensor) -> Tensor:
        """Return phi; past the end of its domain it goes on as its tangent there."""
        if self.divergence == "total_variation":
            return r
        if self.divergence == "pearson":
            return r - r.square() / 4
        if self.divergence == "reverse_kl":
            return -torch.exp(-(r + 1))
        if self.divergence == "hellinger":
            least = NEAR - 1.0
            inside = r.clamp(min=least)
            return inside / (1 + inside) + (r - inside) / NEAR**2
        least = -torch.log(torch.tensor(2.0 - NEAR)).item()
        inside = r.clamp(min=least)
        slope = (2.0 - NEAR) / NEAR
        return torch.log(2 - torch.exp(-inside)) + (r - inside) * slope
