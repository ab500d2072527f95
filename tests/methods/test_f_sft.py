"""phi of the implicit reward."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ft import registry
from mergekit_ft.learning import Said
from tests.spoken import places, said, total

PHI = {
    "total_variation": lambda r: r,
    "pearson": lambda r: r - r * r / 4,
    "hellinger": lambda r: r / (1 + r),
    "reverse_kl": lambda r: -math.exp(-(r + 1)),
    "jensen_shannon": lambda r: math.log(2 - math.exp(-r)),
}


@pytest.mark.parametrize("divergence", list(PHI))
def test_f_sft_is_phi_of_the_implicit_reward(divergence: str) -> None:
    words = said(3)
    wanted = 0.0
    for i, (w, p, _, before) in enumerate(places(words)):
        reward = 0.1 * (math.log(p) - math.log(before[int(words.targets[i])]))
        wanted -= w * PHI[divergence](reward)
    assert total("f_sft", words, divergence=divergence) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("divergence", ["hellinger", "jensen_shannon"])
def test_f_sft_stays_finite_where_phi_has_no_value(divergence: str) -> None:
    logits = torch.zeros(1, 2, dtype=torch.float64)
    logits[0, 1] = 200.0
    lost = logits.clone().requires_grad_()
    words = Said(
        lost,
        torch.tensor([0]),
        torch.ones(1, dtype=torch.float64),
        torch.tensor([0]),
        -logits,
    )
    loss = registry.of_kind("f_sft", "objective")(divergence=divergence).total(words)
    loss.backward()
    assert bool(loss.isfinite()) and bool(lost.grad.isfinite().all())
    assert float(lost.grad[0, 0]) < 0  # it still pulls the token up
