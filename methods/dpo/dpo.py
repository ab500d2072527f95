"""DPO, direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7).

    L = -(1/P) sum over P pairs of w log sigmoid(beta (l_chosen - l_rejected))

l is the sum over an answer's tokens of log p_t - log p_ref,t.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ft.learning import Batch, Objective, Said


class Dpo(Objective):
    """Preference of one answer over another."""

    reference: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0, description="how far the preference may pull; usually 0.1")

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over pairs."""
        assert said.reference is not None
        before = -torch.nn.functional.cross_entropy(said.reference, said.targets, reduction="none")
        gains = said.log_probabilities() - before
        rows = int(said.rows[-1]) + 1
        answers = gains.new_zeros(rows).index_add(0, said.rows, gains)
        weights = said.weights.new_zeros(rows).index_copy(0, said.rows, said.weights)
        margins = self.beta * (answers[0::2] - answers[1::2])
        return -(weights[0::2] * torch.nn.functional.logsigmoid(margins)).sum()

    def count(self, batch: Batch) -> int:
        """Return the pairs of a batch."""
        return len(batch["labels"]) // 2
