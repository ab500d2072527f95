"""Intruders are counted as the definition counts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_ft.layers import Place
from mergekit_ft.looking import Seen
from mergekit_ft.methods.intruder_dimensions import IntruderDimensions


def spiked(dice: np.random.Generator, shape: tuple[int, int], spikes: int) -> np.ndarray:
    """Return a change of low rank in random directions, some of them strong."""
    made = np.zeros(shape)
    for _ in range(spikes):
        u, v = dice.standard_normal(shape[0]), dice.standard_normal(shape[1])
        size = dice.choice([2.0, 20.0, 60.0])
        made += size * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    return made


def plainly(base: np.ndarray, tuned: np.ndarray, k: int, epsilon: float) -> list[int]:
    u0 = np.linalg.svd(base, full_matrices=False)[0]
    u = np.linalg.svd(tuned, full_matrices=False)[0]
    return [
        j
        for j in range(min(k, u.shape[1]))
        if max(abs(float(u[:, j] @ u0[:, i])) for i in range(u0.shape[1])) < epsilon
    ]


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_the_definition(seed: int) -> None:
    dice = np.random.default_rng(seed)
    shape = [(40, 60), (60, 40), (48, 48)][seed % 3]
    base = dice.standard_normal(shape)
    tuned = base + spiked(dice, shape, 1 + seed % 4)
    k, epsilon = int(dice.choice([1, 5, 10, 100])), float(dice.choice([0.3, 0.5, 0.7]))
    probe = IntruderDimensions(k=k, epsilon=epsilon)
    whole = (torch.from_numpy(base), torch.from_numpy(tuned))
    place = Place("block", "model.layers", 0, 1)
    finding = probe.look(Seen("w", place, shape, False, whole=whole))
    wanted = plainly(base, tuned, k, epsilon)
    assert finding["matrices"][0]["which"] == wanted
    assert finding["intruders"] == len(wanted)
    turned = (whole[0].T, whole[1].T)
    again = probe.look(Seen("w", place, shape[::-1], True, whole=turned))
    assert again["matrices"][0]["which"] == wanted


def test_experts_are_looked_at_one_by_one() -> None:
    dice = np.random.default_rng(0)
    base = dice.standard_normal((3, 20, 30))
    tuned = base.copy()
    tuned[1] += spiked(dice, (20, 30), 3) * 10
    place = Place("block", "model.layers", 0, 1)
    whole = (torch.from_numpy(base), torch.from_numpy(tuned))
    found = IntruderDimensions().look(Seen("w", place, (3, 20, 30), False, whole=whole))
    assert [bool(one["which"]) for one in found["matrices"]] == [False, True, False]


def test_what_was_not_tuned_has_no_intruder() -> None:
    base = torch.randn(30, 20, dtype=torch.float64)
    found = IntruderDimensions(epsilon=1.0).look(
        Seen("w", Place(), (30, 20), False, whole=(base, base.clone()))
    )
    assert found["least_nearest"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), True),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.embed_tokens.weight", (8, 4), False),
        ("lm_head.weight", (8, 4), False),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 4), True),
    ],
)
def test_matrices_of_layers_are_looked_at(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    from mergekit_ft.layers import places

    assert IntruderDimensions().wants(name, places([name])[name], shape) == wanted
