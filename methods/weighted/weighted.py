"""Reward-weighted fine-tuning (RISE, Qu et al. 2024, arXiv:2407.18219).

    L = -(1/N) sum_t exp(r / tau) log p_t

r is the `weight` of the row, its reward; of a conversation only the last of the assistant's turns
should be scored, which rows of `prompt` and `completion` do.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mergekit_ft.learning import Objective, Said


class Weighted(Objective):
    """Likelihood by exponentiated rewards."""

    tau: float = Field(0.4, gt=0, description="temperature of the rewards; the authors' 0.4")

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        return -((said.weights / self.tau).exp() * said.log_probabilities()).sum()
