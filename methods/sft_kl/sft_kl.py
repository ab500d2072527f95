"""Supervised fine-tuning with a KL term to the model before tuning.

    L = (1/N) sum_t w_t { -log p_t + lambda KL(pi_ref(. | s_t) || pi(. | s_t)) }

The ablation of ASFT (2025, arXiv:2509.23753) without its weights p_t.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from mergekit_ft.algebra.divergence import forward_kl
from mergekit_ft.learning import Objective, Said


class SftKl(Objective):
    """Likelihood with an anchor."""

    reference: ClassVar[bool] = True

    lambda_: float = Field(0.05, ge=0, alias="lambda", description="of the KL; as for asft")

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        assert said.reference is not None
        near = forward_kl(said.reference, said.logits)
        return (said.weights * (self.lambda_ * near - said.log_probabilities())).sum()
