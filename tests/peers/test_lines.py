"""LiNeS against its formula worked by hand, and against a gradient of mergekit's `lambda`.

mergekit has no LiNeS, but `lambda: [alpha, alpha + beta]` scales the merged delta of every layer by
the same line, and of what is outside the layers by alpha.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import tiny_llama, tiny_t5, write_checkpoint
from tests.peers.both import our_merge, pair, their_merge
from tests.peers.conftest import Checkpoints
from tests.peers.distances import relative_distance
from tests.peers.families import MERGED
from tests.peers.peer import Peer, Plan, tensors_of
from tests.peers.plans import plan_of

pytestmark = pytest.mark.peer

NEAR = 1e-6  # of the largest value that went into an element


def zeros_and_ones(folder: Path, example: Path) -> tuple[str, str]:
    """Write a base of zeros and a tuned model of ones: a merge shows the factor of each delta."""
    names = tensors_of(example)
    config = (example / "config.json").read_text()
    paths = []
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        filled = {name: torch.full_like(tensor, value) for name, tensor in names.items()}
        (write_checkpoint(folder / name, filled) / "config.json").write_text(config)
        paths.append(str(folder / name))
    return paths[0], paths[1]


def the_value_of(tensor: Tensor) -> float:
    value = float(tensor.flatten()[0])
    assert torch.equal(tensor, torch.full_like(tensor, value))
    return value


@pytest.mark.parametrize(
    ("given", "by_layer"),
    [
        ({"alpha": 0.5, "beta": 3.0}, [0.5, 1.5, 2.5, 3.5]),
        ({"gamma": 0.25}, [0.25, 0.5, 0.75, 1.0]),
        ({"alpha": 2.0, "beta": -3.0}, [2.0, 1.0, 0.0, -1.0]),
    ],
)
@pytest.mark.parametrize("after_a_merge", [False, True])
def test_the_coefficients_are_those_worked_by_hand(
    tmp_path: Path, given: dict[str, Any], by_layer: list[float], after_a_merge: bool
) -> None:
    base, tuned = zeros_and_ones(tmp_path, tiny_llama(tmp_path / "example", layers=4))
    plan: Plan = {"merge_method": "lines", "base_model": base, "models": [{"model": tuned}]}
    if after_a_merge:
        plan |= {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}
        plan["then"] = [{"lines": given}]
    else:
        plan["parameters"] = given
    for name, tensor in our_merge(plan).items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else 0  # outside the layers: alpha
        assert the_value_of(tensor) == by_layer[layer], name


def test_encoder_and_decoder_each_have_a_line_of_their_own(tmp_path: Path) -> None:
    example = tiny_t5(tmp_path / "example", layers=3, num_decoder_layers=5)
    base, tuned = zeros_and_ones(tmp_path, example)
    plan = {
        "merge_method": "lines",
        "base_model": base,
        "models": [{"model": tuned}],
        "parameters": {"alpha": 0.5, "beta": 1.0},
    }
    lines = {"encoder": [0.5, 1.0, 1.5], "decoder": [0.5, 0.75, 1.0, 1.25, 1.5]}
    for name, tensor in our_merge(plan).items():
        parts = name.split(".")
        expected = lines[parts[0]][int(parts[2])] if ".block." in name else 0.5
        assert the_value_of(tensor) == expected, name


@pytest.mark.parametrize(
    ("weights", "alpha"),
    [
        ([1.0, 1.0, 1.0], 1 / 3),  # |3 d| / |3 d| / 3
        ([2.0], 1 / 2),  # |d| / |2 d| / 1
        ([0.5, 0.25], 4 / 3),  # |2 d| / |0.75 d| / 2
    ],
)
def test_alpha_auto_gives_the_merge_the_norm_of_the_mean_delta(
    tmp_path: Path, weights: list[float], alpha: float
) -> None:
    base, tuned = zeros_and_ones(tmp_path, tiny_llama(tmp_path / "example", layers=3))
    copies = [tuned, *(shutil.copytree(tuned, f"{tuned}{i}") for i in range(1, len(weights)))]
    plan = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [
            {"model": path, "parameters": {"weight": weight}}
            for path, weight in zip(copies, weights, strict=True)
        ],
        "then": [{"lines": {"alpha": "auto", "beta": 1.0}}],
    }
    for name, tensor in our_merge(plan).items():
        parts = name.split(".")
        depth = int(parts[2]) / 2 if parts[1] == "layers" else 0.0
        expected = (alpha + depth) * sum(weights)
        assert the_value_of(tensor) == pytest.approx(expected, rel=2e-7), name


@pytest.mark.parametrize("family_name", MERGED)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.6), (1.0, -0.5)])
def test_lines_after_a_merge_is_the_peers_gradient_of_lambda(
    peer: Peer, checkpoints: Checkpoints, family_name: str, method: str, alpha: float, beta: float
) -> None:
    family = checkpoints(family_name, layers=5)
    density = {"ties": 0.4, "dare_linear": 1.0}.get(method)
    given: dict[str, Any] = (
        {"weight": 0.7} if density is None else {"weight": 0.7, "density": density}
    )
    plan = {**plan_of(method, family, [{}, {}, {}], **given), "dtype": "float32"}
    ours = our_merge({**plan, "then": [{"lines": {"alpha": alpha, "beta": beta}}]})
    gradient = {**given, "lambda": [alpha, alpha + beta]}
    theirs = their_merge(peer, family, {**plan, "parameters": gradient})
    for merged in pair(plan, ours, theirs):
        assert float(relative_distance(merged).max()) < NEAR, merged.name


@pytest.mark.parametrize("family_name", MERGED)
def test_lines_of_one_model_is_the_peers_gradient_of_lambda(
    peer: Peer, checkpoints: Checkpoints, family_name: str
) -> None:
    family = checkpoints(family_name, layers=5)
    plan = {**plan_of("lines", family, [{}], gamma=0.3), "dtype": "float32"}
    same = plan_of("task_arithmetic", family, [{"weight": 1.0}], lambda_=[0.3, 1.0])
    theirs = their_merge(peer, family, {**same, "dtype": "float32"})
    for merged in pair(plan, our_merge(plan), theirs):
        assert float(relative_distance(merged).max()) < NEAR, merged.name
