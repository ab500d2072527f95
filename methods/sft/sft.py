"""Supervised fine-tuning.

    L = (1/N) sum_t w_t (-log p(y_t | y_<t, x))

over the N scored tokens of a step; w_t is the weight of the row that a token is of (1 where rows
have none).
"""

from __future__ import annotations

from torch import Tensor

from mergekit_ft.learning import Objective, Said


class Sft(Objective):
    """Negative log-likelihood."""

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        return -(said.weights * said.log_probabilities()).sum()
