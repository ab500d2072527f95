"""How far modules move, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, models, weights

__all__ = ["models"]

NORM = "model.norm.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


def chain() -> None:
    """Write three checkpoints: two tensors move, by one and then by three."""
    base = weights(0)
    for number, step in enumerate((0.0, 1.0, 4.0)):
        held = {name: tensor.clone() for name, tensor in base.items()}
        held[NORM] = torch.full((8,), 2.0) + step
        for layer in (0, 2):
            held[UP.format(layer)] += 0.01 * step
        write_checkpoint(Path(f"c{number}"), held, config=CONFIG)


def probed(*words: str) -> dict[str, object]:
    result = cli("probe", "sensitivity", *words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_the_mean_step_and_its_relative_norm_are_those_of_the_chain() -> None:
    chain()
    report = probed("c0", "c1", "c2")
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}  # type: ignore[index,attr-defined]
    norm = tensors[NORM]
    assert [step["mean"] for step in norm["steps"]] == [1.0, 3.0]
    assert norm["mean"] == 2.0
    assert norm["relative"] == pytest.approx((1 / 2 + 3 / 3) / 2)
    assert tensors["lm_head.weight"]["mean"] == 0.0


def test_a_family_is_all_layers_of_one_name() -> None:
    chain()
    report = probed("c0", "c2")
    families = {one["family"]: one for one in report["families"]}  # type: ignore[index,attr-defined]
    up = families["model.layers.*.mlp.up_proj.weight"]
    assert up["tensors"] == 3
    assert up["mean"] == pytest.approx(0.04 * 2 / 3, rel=1e-5)  # two of three layers moved
    held = weights(0)
    norm = math.sqrt(sum(float(held[UP.format(i)].double().square().sum()) for i in range(3)))
    moved = math.sqrt(2 * 16 * 8) * 0.04
    assert up["relative"] == pytest.approx(moved / norm, rel=1e-5)


def test_the_list_names_the_most_sensitive_for_the_tuner() -> None:
    chain()
    result = cli("probe", "sensitivity", "c0", "c2", "--set", "top=2", "--write", "list.txt")
    assert result.exit_code == 0
    assert Path("list.txt").read_text().splitlines() == [
        NORM,
        "model.layers.*.mlp.up_proj.weight",
    ]


def test_one_model_is_too_few() -> None:
    result = cli("probe", "sensitivity", "base")
    assert result.exit_code == 3
    assert "looks at at least 2 models" in result.stderr
