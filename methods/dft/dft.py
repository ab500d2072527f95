"""DFT, dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629, Eq. 9).

    L = (1/N) sum_t w_t sg(p_t) (-log p_t)

p_t is the probability of the token that came, sg stops the gradient, so the gradient is that of
-p_t: the factor 1/p_t of likelihood training is gone. A token that the model finds impossible
teaches nothing.
"""

from __future__ import annotations

from torch import Tensor

from mergekit_ft.learning import Objective, Said


class Dft(Objective):
    """Likelihood weighted by the model's own probability."""

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        logs = said.log_probabilities()
        return -(said.weights * logs.detach().exp() * logs).sum()
