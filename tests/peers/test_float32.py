"""In float32, every plan gives what mergekit 0.1.5 gives.

`ties` without `rescale` and `linear` without `normalize` are identical bit for bit. Elsewhere the
same terms are added or rounded in another order, which moves a result by less than 1e-6 of the
largest value merged into it:

    linear, normalize     ours adds the weighted differences to the first model, so that equal
                          models come out as they are; mergekit divides a sum by a sum
    slerp                 ours adds up norms and products in float64; in float32 the error grows
                          with the tensor, so large ones are compared with the formula too
    task_arithmetic       ours adds a product in one rounding, mergekit in two
    ties, rescale         ours adds up L1 norms in float64
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_ft
from tests.peers.both import Merged, merge_by_both, pair
from tests.peers.conftest import Checkpoints
from tests.peers.distances import relative_distance
from tests.peers.families import MERGED
from tests.peers.peer import Peer, Plan, tensors_of, text_of
from tests.peers.plans import PLANS, plan_of

pytestmark = pytest.mark.peer

NEAR = 1e-6  # of the largest value that went into an element
BIT_FOR_BIT = {("linear", "not normalized")} | {
    ("ties", words) for words in PLANS["ties"] if words not in ("rescale", "gradients")
}
LARGE = {"vocab_size": 5003, "hidden_size": 64, "layers": 2}  # embeddings of 320,192 elements
SHARDS = {"one file": 1, "shards": 3}
CASES = [
    pytest.param(method, words, id=f"{method}: {words}")
    for method, plans in PLANS.items()
    for words in plans
]


def assert_near(merged: Merged) -> None:
    worst = float(relative_distance(merged).max())
    assert worst < NEAR, f"{merged.name} is {worst:.1e} apart"


def float32(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32"}


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("family_name", MERGED)
@pytest.mark.parametrize(("method", "words"), CASES)
def test_a_plan_gives_what_the_peer_gives(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str, family_name: str, shards: str
) -> None:
    family = checkpoints(family_name, shards=SHARDS[shards])
    for merged in merge_by_both(peer, family, float32(PLANS[method][words](family))):
        if (method, words) in BIT_FOR_BIT:
            assert torch.equal(merged.ours, merged.theirs), merged.name
        else:
            assert_near(merged)


@pytest.mark.parametrize(("method", "words"), [case for case in CASES if case.values[0] != "slerp"])
def test_tensors_of_several_cells_and_blocks_merge_as_the_peers(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str
) -> None:
    family = checkpoints("llama", **LARGE)
    for merged in merge_by_both(peer, family, float32(PLANS[method][words](family))):
        if (method, words) in BIT_FOR_BIT:
            assert torch.equal(merged.ours, merged.theirs), merged.name
        else:
            assert_near(merged)


@pytest.mark.parametrize("t", [0.3, 0.6, 1.4])
def test_slerp_of_large_tensors_is_the_formula_and_near_the_peers(
    peer: Peer, checkpoints: Checkpoints, t: float
) -> None:
    family = checkpoints("llama", **LARGE)
    plan = float32(plan_of("slerp", family, [{}], t=t))
    for merged in merge_by_both(peer, family, plan):
        if "norm" not in merged.name:  # nearly parallel: a line
            base, tuned = merged.sources
            assert_near(replace(merged, theirs=arc(base, tuned, t).float()))
        assert float(relative_distance(merged).max()) < 5 * NEAR, merged.name


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the point at t between two tensors taken as vectors, in float64."""
    a, b = a.double(), b.double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("family_name", ["llama", "t5_gated"])
def test_gradients_run_over_any_number_of_layers_as_the_peers(
    peer: Peer, checkpoints: Checkpoints, family_name: str, layers: int
) -> None:
    family = checkpoints(family_name, layers=layers)
    plan = plan_of("ties", family, [{"weight": [0.2, 1.1, 0.7]}, {"weight": [1, 0]}], density=0.7)
    for merged in merge_by_both(peer, family, float32(plan)):
        assert torch.equal(merged.ours, merged.theirs), merged.name


@pytest.mark.parametrize("method", PLANS)
def test_float64_checkpoints_merge_in_float64_as_the_peers(
    peer: Peer, checkpoints: Checkpoints, method: str
) -> None:
    family = checkpoints("llama", dtype=torch.float64)
    plan = next(iter(PLANS[method].values()))(family)
    near = NEAR if method == "slerp" else 1e-14  # the peer's slerp works in float32
    for merged in merge_by_both(peer, family, plan):
        assert merged.ours.dtype == torch.float64
        assert float(relative_distance(merged).max()) < near, merged.name


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("linear", "filters"),
        ("slerp", "gradient"),
        ("task_arithmetic", "precedence"),
        ("ties", "filters and precedence"),
    ],
)
def test_sharded_checkpoints_on_disk_hold_what_the_peers_hold(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str, tmp_path: Path
) -> None:
    family = checkpoints("qwen2", shards=3)
    plan = float32(PLANS[method][words](family))
    mergekit_ft.merge(text_of(plan), tmp_path / "ours", max_shard_size=20_000)
    theirs = peer.merge(plan, out_shard_size=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for merged in pair(plan, tensors_of(tmp_path / "ours"), theirs):
        assert_near(merged)
