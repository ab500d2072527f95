"""Full fine-tuning is AdamW over every parameter."""

from __future__ import annotations

from pathlib import Path

from tests.tuned import (
    Batch,
    DenseAdamW,
    everywhere,
    gradients,
    largest_difference,
    model_of,
    plan,
    recorded,
    small_base,
    steps,
    trained,
    weights,
)

__all__ = ["recorded"]


def test_full_fine_tuning_is_adamw_over_a_steps_tokens(
    tmp_path: Path, recorded: list[Batch]
) -> None:
    made = trained(plan(tmp_path, "full", accumulation=2, weight_decay=0.1), tmp_path / "out")
    model = model_of(tmp_path / "base")
    optimizer = DenseAdamW(everywhere(model), 1e-3, 0.1)
    for group in steps(recorded[:12], 2):
        optimizer.step(model, gradients(model, group))
    assert largest_difference(weights(model), made) < 2e-6


def test_tied_weights_train_once(tmp_path: Path, recorded: list[Batch]) -> None:
    small_base(tmp_path / "base", tied=True)
    made = trained(plan(tmp_path, "full"), tmp_path / "out")
    assert "lm_head.weight" not in made
    model = model_of(tmp_path / "base")
    optimizer = DenseAdamW(everywhere(model), 1e-3)
    for batch in recorded[:6]:
        optimizer.step(model, gradients(model, [batch]))
    assert largest_difference(weights(model), made) < 2e-6
