"""The plans that mergekit shows as examples, in their shapes, run unchanged and agree.

The peer computes in the dtype that a plan names, ours in float32 with one rounding; so the peer is
asked for the same plan in float32, stored as the plan says, and may be one unit in the last place
away. Of a plan that drops at random only what does not depend on chance is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mergekit_ft
from tests.peers.both import Merged
from tests.peers.conftest import Checkpoints
from tests.peers.distances import units_apart
from tests.peers.families import Family
from tests.peers.peer import Peer, Plan, tensors_of, text_of

pytestmark = pytest.mark.peer

LAYERS = 8


def linear(f: Family) -> Plan:
    """Three models by weight."""
    weights = zip(f.tuned, (1.0, 0.3, 0.5), strict=True)
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights]
    return {"models": models, "merge_method": "linear", "dtype": "float16"}


def ties(f: Family) -> Plan:
    """Gradients of density and of weight, and a filter, over a base."""
    one, two, three = f.tuned
    only_mlp = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
    return {
        "models": [
            {"model": one, "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {"model": two, "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
            {"model": three, "parameters": {"density": 0.33, "weight": only_mlp}},
        ],
        "merge_method": "ties",
        "base_model": f.base,
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
    }


def gradient_slerp(f: Family) -> Plan:
    """All layers of two models, by gradients that filters choose."""
    sources = [{"model": model, "layer_range": [0, LAYERS]} for model in f.tuned[:2]]
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    return {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": f.tuned[0],
        "parameters": {"t": t},
        "dtype": "float16",
    }


def two_halves(f: Family) -> Plan:
    """The lower layers of one model under the upper ones of another, overlapping."""
    lower = {"model": f.tuned[0], "layer_range": [0, 5]}
    upper = {"model": f.tuned[1], "layer_range": [3, LAYERS]}
    return {
        "slices": [{"sources": [lower]}, {"sources": [upper]}],
        "merge_method": "passthrough",
        "dtype": "float16",
    }


def dare_ties(f: Family) -> Plan:
    """Two models over a base that is listed without parameters."""
    words = zip(f.tuned, (0.53, 0.5), (0.4, 0.3), strict=False)
    models = [
        {"model": model, "parameters": {"density": density, "weight": weight}}
        for model, density, weight in words
    ]
    return {
        "models": [{"model": f.base}, *models],
        "merge_method": "dare_ties",
        "base_model": f.base,
        "parameters": {"int8_mask": True},
        "dtype": "bfloat16",
    }


def in_float32(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32", "out_dtype": plan["dtype"]}


@pytest.mark.parametrize("write", [linear, ties, gradient_slerp, two_halves])
def test_a_published_plan_runs_unchanged_and_agrees(
    peer: Peer, checkpoints: Checkpoints, tmp_path: Path, write: Callable[[Family], Plan]
) -> None:
    plan = write(checkpoints("llama", layers=LAYERS))
    mergekit_ft.merge(text_of(plan), tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), peer.merge(in_float32(plan))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert int(units_apart(Merged(name, ours[name], value, [])).max()) <= 1, name


def test_a_published_plan_of_random_masks_runs_unchanged(
    peer: Peer, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    family = checkpoints("llama", layers=LAYERS)
    plan = dare_ties(family)
    mergekit_ft.merge(text_of(plan), tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), peer.merge(in_float32(plan), random_seed=1)
    base = tensors_of(Path(family.base))
    assert {name: x.dtype for name, x in ours.items()} == {n: x.dtype for n, x in theirs.items()}
    moved = [
        torch.cat([(out[name].float() - base[name].float()).flatten() for name in base])
        for out in (ours, theirs)
    ]
    assert float(moved[0].abs().sum() / moved[1].abs().sum()) == pytest.approx(1.0, abs=0.02)
    share = [float((delta.abs() > 1e-3).float().mean()) for delta in moved]
    assert share[0] == pytest.approx(share[1], abs=0.01)
