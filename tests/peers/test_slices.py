"""Stacks of layers, in the shapes that people publish, give what mergekit 0.1.5 gives.

Where the last output slice has more sources than the first, mergekit drops those beyond the
first's number from the tensors after the layers; ours merges them all, as the slice says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekit_ft
from tests.peers import families
from tests.peers.conftest import Checkpoints
from tests.peers.families import Family
from tests.peers.peer import Peer, Plan, tensors_of, text_of

pytestmark = pytest.mark.peer

NEAR = 1e-6  # of the largest value of a tensor
LAYERS = 4
COUNTS = {"llama": "num_hidden_layers", "qwen2": "num_hidden_layers", "gpt2": "n_layer"}


def taken(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [first, end]}
    return source | ({"parameters": parameters} if parameters else {})


def self_stack(f: Family) -> Plan:
    """One model's layers, the middle ones twice."""
    ranges = [(0, 3), (1, 3), (1, 4)]
    return {
        "merge_method": "linear",
        "slices": [{"sources": [taken(f.base, *r, weight=1.0)]} for r in ranges],
    }


def interleaved(f: Family) -> Plan:
    """Overlapping blocks of two models in turn."""
    blocks = [(f.tuned[0], 0, 2), (f.tuned[1], 1, 3), (f.tuned[0], 2, 4), (f.tuned[1], 3, 4)]
    return {
        "merge_method": "linear",
        "slices": [{"sources": [taken(*block)], "parameters": {"weight": 1}} for block in blocks],
    }


def slerp_by_filters(f: Family) -> Plan:
    """All layers of two models, t by gradients that filters choose, anew in every slice."""
    t = [
        {"filter": f.words.attention, "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": f.words.feed_forward, "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    ranges = [(0, 2), (1, 4)]
    return {
        "merge_method": "slerp",
        "base_model": f.base,
        "slices": [{"sources": [taken(f.base, *r), taken(f.tuned[0], *r)]} for r in ranges],
        "parameters": {"t": t},
    }


def arithmetic(f: Family) -> Plan:
    """Deltas over a base, with values at every level and layers from unlike places."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": f.base,
        "parameters": {"weight": 0.3, "lambda": 0.9},
        "slices": [
            {
                "sources": [
                    taken(f.base, 0, 2),
                    taken(f.tuned[0], 0, 2, weight=[0.2, 0.8]),
                    taken(f.tuned[1], 1, 3),
                ],
                "parameters": {"lambda": 1.1},
            },
            {
                "sources": [
                    taken(f.base, 1, 4),
                    taken(f.tuned[0], 1, 4),
                    taken(f.tuned[1], 1, 4, weight=[{"filter": f.words.norm, "value": 0.5}]),
                ],
                "parameters": {"weight": [0.6, 0.1]},
            },
        ],
    }


def bases_by_slice(f: Family) -> Plan:
    """Another base in the second slice."""
    return {
        "merge_method": "ties",
        "base_model": f.base,
        "parameters": {"weight": 0.7, "density": 0.5},
        "slices": [
            {"sources": [taken(f.base, 0, 3), taken(f.tuned[0], 0, 3)]},
            {
                "base_model": f.tuned[1],
                "sources": [taken(f.tuned[2], 2, 4), taken(f.tuned[1], 2, 4)],
            },
        ],
    }


def one_layer_each(f: Family) -> Plan:
    """Slices of a single layer: a gradient's last value."""
    return {
        "merge_method": "linear",
        "parameters": {"weight": [0.2, 0.9]},
        "slices": [
            {"sources": [taken(f.tuned[0], i, i + 1), taken(f.tuned[1], i, i + 1, weight=[1, 3])]}
            for i in (3, 0, 1)
        ],
    }


def filters_by_layer(f: Family) -> Plan:
    """A filter of one model goes by that model's own layer numbers."""
    return {
        "merge_method": "linear",
        "slices": [
            {"sources": [taken(f.tuned[0], 0, 2, weight=1), taken(f.tuned[1], 0, 2, weight=1)]},
            {
                "sources": [
                    taken(f.tuned[0], 0, 2, weight=[{"filter": ".0.", "value": 3}, {"value": 1}]),
                    taken(f.tuned[1], 2, 4, weight=[{"filter": ".3.", "value": 5}, {"value": 1}]),
                ],
                "parameters": {"normalize": [{"filter": ".2.", "value": False}, {"value": True}]},
            },
        ],
    }


PLANS = [self_stack, interleaved, slerp_by_filters, arithmetic, bases_by_slice, one_layer_each]
PLANS += [filters_by_layer]


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].shape == theirs[name].shape, name
        scale = max(float(theirs[name].abs().max()), 1e-3)
        assert float((ours[name] - theirs[name]).abs().max()) < NEAR * scale * 4, name


def height(plan: Plan) -> int:
    ranges = [part["sources"][0]["layer_range"] for part in plan["slices"]]
    return sum(end - first for first, end in ranges)


def make_stackable(family: Family) -> None:
    """Let the peer load Qwen2's config as a Llama's: it leaves `layer_types` as long as it was.

    The architecture, by which it knows the tensors, stays.
    """
    for folder in (family.base, *family.tuned):
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        if config.pop("layer_types", None) is not None:
            path.write_text(json.dumps({**config, "model_type": "llama"}))


@pytest.mark.parametrize("family_name", COUNTS)
@pytest.mark.parametrize("plan_for", PLANS)
def test_a_stack_gives_what_the_peer_gives_and_loads(
    peer: Peer, plan_for: Any, family_name: str, tmp_path: Path
) -> None:
    import transformers

    family = families.build(tmp_path, family_name, layers=LAYERS)
    plan = {**plan_for(family), "dtype": "float32"}
    mergekit_ft.merge(text_of(plan), tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config[COUNTS[family_name]] == height(plan)
    assert len(config.get("layer_types", [0] * height(plan))) == height(plan)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    make_stackable(family)
    assert_near(ours, peer.merge(plan))


def test_what_comes_after_the_layers_takes_every_source_of_the_last_slice(
    peer: Peer, checkpoints: Checkpoints
) -> None:
    family = checkpoints("llama", layers=LAYERS)
    one, two = family.tuned[:2]
    both = [taken(one, 2, 4, weight=1.0), taken(two, 2, 4, weight=3.0)]
    stack = [{"sources": [taken(one, 0, 2, weight=1.0)]}, {"sources": both}]
    plan = {"merge_method": "linear", "slices": stack, "dtype": "float32"}
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        ours = dict(merged.items())
    theirs = peer.merge(plan)
    for name in ("model.norm.weight", "lm_head.weight"):
        first, second = (tensors_of(Path(path))[name].double() for path in (one, two))
        assert torch.equal(theirs[name], first.float())  # the peer drops the second source
        wanted = (first + 3 * second) / 4
        assert float((ours[name] - wanted).abs().max()) < NEAR
        ours[name] = theirs[name]
    assert_near(ours, theirs)


def test_stacks_of_a_model_that_has_several_give_what_the_peer_gives(
    peer: Peer, checkpoints: Checkpoints
) -> None:
    f = checkpoints("t5_gated", layers=LAYERS)
    one, two = f.tuned[:2]
    encoder = [
        {"sources": [taken(one, 0, 2, weight=[1, 2]), taken(two, 0, 2)]},
        {"sources": [taken(one, 1, 3), taken(two, 2, 4)], "parameters": {"weight": 0.3}},
    ]
    models = [{"model": one, "parameters": {"weight": [0.1, 0.9]}}, {"model": two}]
    plan: Plan = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"weight": 1},
        "modules": {
            "encoder": {"slices": encoder, "parameters": {"weight": 0.6}},
            "decoder": {"models": models},
            "shared": {"models": models},
        },
    }
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        ours = dict(merged.items())
    assert_near(ours, peer.merge(plan))


@pytest.mark.parametrize("family_name", ["llama", "gpt2"])
def test_a_passthrough_stack_is_bit_for_bit_the_peers(
    peer: Peer, checkpoints: Checkpoints, family_name: str
) -> None:
    f = checkpoints(family_name, layers=LAYERS)
    out = {"llama": "o_proj", "gpt2": "c_proj"}[family_name]
    quiet = [{"filter": out, "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    plan = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [
            {"sources": [taken(f.tuned[0], 0, 3)]},
            {"sources": [taken(f.tuned[0], 1, 3, scale=quiet if family_name == "llama" else 0.5)]},
            {"sources": [taken(f.tuned[1], 2, 4)]},
        ],
    }
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        ours = dict(merged.items())
    theirs = peer.merge(plan)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
