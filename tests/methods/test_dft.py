"""DFT: likelihood weighted by probability."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ft import registry
from mergekit_ft.learning import Said
from tests.spoken import N, places, said, total


def test_dft_weighs_by_probability_and_its_gradient_is_that_of_minus_p() -> None:
    words = said()
    wanted = sum(-w * p * math.log(p) for w, p, _, _ in places(words))
    assert total("dft", words) == pytest.approx(wanted, rel=1e-12)
    logits = words.logits.clone().requires_grad_()
    made = Said(logits, words.targets, words.weights, words.rows)
    registry.of_kind("dft", "objective")().total(made).backward()
    other = words.logits.clone().requires_grad_()
    chosen = torch.softmax(other, -1)[torch.arange(N), words.targets]
    (-(words.weights * chosen).sum()).backward()
    assert torch.allclose(logits.grad, other.grad, atol=1e-14)
