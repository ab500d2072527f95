"""HFT: half of every block."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tuned import (
    Batch,
    DenseAdamW,
    everywhere,
    gradients,
    largest_difference,
    model_of,
    plan,
    recorded,
    trained,
    weights,
)

__all__ = ["recorded"]


def test_frozen_halves_are_left_as_they_are(tmp_path: Path, recorded: list[Batch]) -> None:
    made = trained(plan(tmp_path, "hft", weight_decay=0.5), tmp_path / "out")
    base = weights(model_of(tmp_path / "base"))
    same = {name for name in base if torch.equal(made[name], base[name])}
    counts = []
    for layer in range(2):
        mine = {n for n in same if f"layers.{layer}." in n}
        assert sum("self_attn" in n for n in mine) == 2
        assert sum("norm" in n for n in mine) == 1
        counts.append(3 - sum("mlp" in n for n in mine))
    assert sorted(counts) == [1, 2]
    model = model_of(tmp_path / "base")
    masks = {n: m for n, m in everywhere(model).items() if n not in same}
    optimizer = DenseAdamW(masks, 1e-3, 0.5)
    for batch in recorded:
        optimizer.step(model, gradients(model, [batch]))
    assert largest_difference(weights(model), made) < 2e-6
