"""ASFT, anchored supervised fine-tuning (2025, arXiv:2509.23753).

    L = (1/N) sum_t w_t { sg(p_t) (-log p_t) + lambda KL(pi_ref(. | s_t) || pi(. | s_t)) }

over scored places, with the whole vocabulary in the KL; pi_ref is the model before tuning.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from mergekit_ft.algebra.divergence import forward_kl
from mergekit_ft.learning import Objective, Said


class Asft(Objective):
    """DFT with an anchor."""

    reference: ClassVar[bool] = True

    lambda_: float = Field(
        0.05, ge=0, alias="lambda", description="of the KL; the paper's 0.05, its code's 0.1"
    )

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        assert said.reference is not None
        logs = said.log_probabilities()
        near = forward_kl(said.reference, said.logits)
        return (said.weights * (self.lambda_ * near - logs.detach().exp() * logs)).sum()
