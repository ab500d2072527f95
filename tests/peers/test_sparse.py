"""Methods that make task vectors sparse give what mergekit 0.1.5 gives, where chance has no part.

In float32 a result is within 1e-6 of the largest value that was merged into it; in bfloat16, with
the peer run as `dtype: float32, out_dtype: bfloat16`, within one unit in the last place. Left out
are the elements that the two may choose otherwise:

    breadcrumbs   of equal magnitudes at an edge mergekit's unstable sort keeps any; float32 has
                  next to none, bfloat16 some
    sce           a variance within a rounding of the edge; where models were stored in bfloat16,
                  equal ones too. The models' weights come from what is kept, so there the rest of
                  the tensor may differ by as much as those elements weigh
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_ft
from tests.checkpoints import tiny_llama, write_checkpoint
from tests.peers.both import Merged, merge_by_both, our_merge
from tests.peers.conftest import Checkpoints
from tests.peers.distances import relative_distance, units_apart
from tests.peers.edges import Edge, at_an_edge
from tests.peers.families import MERGED
from tests.peers.peer import Peer, Plan, tensors_of, text_of
from tests.peers.sparse_plans import SPARSE

pytestmark = pytest.mark.peer

NEAR = 1e-6  # of the largest value that went into an element
FEW = 0.05  # of a model's elements
LARGE = {"vocab_size": 5003, "hidden_size": 64, "layers": 2}  # embeddings of 320,192 elements
CASES = [
    pytest.param(method, words, id=f"{method}: {words}")
    for method, plans in SPARSE.items()
    for words in plans
]


def require_near(merged: Merged, edge: Edge) -> None:
    apart = relative_distance(merged)[~edge.mask]
    worst = float(apart.max()) if apart.numel() else 0.0
    assert worst < NEAR, f"{merged.name} is {worst:.1e} apart"


@pytest.mark.parametrize("family_name", MERGED)
@pytest.mark.parametrize(("method", "words"), CASES)
def test_a_plan_gives_what_the_peer_gives(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str, family_name: str
) -> None:
    family = checkpoints(family_name)
    plan = {**SPARSE[method][words](family), "dtype": "float32"}
    edges = at_an_edge(plan)
    for merged in merge_by_both(peer, family, plan):
        require_near(merged, edges[merged.name])
    numel = sum(edge.mask.numel() for edge in edges.values())
    assert sum(int(edge.mask.sum()) for edge in edges.values()) < 0.001 * numel


@pytest.mark.parametrize(("method", "words"), CASES)
def test_tensors_of_several_cells_and_blocks_merge_as_the_peers(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str
) -> None:
    family = checkpoints("llama", **LARGE)
    plan = {**SPARSE[method][words](family), "dtype": "float32"}
    edges = at_an_edge(plan)
    for merged in merge_by_both(peer, family, plan):
        require_near(merged, edges[merged.name])


@pytest.mark.parametrize("family_name", MERGED)
@pytest.mark.parametrize(("method", "words"), CASES)
def test_a_plan_gives_what_the_peer_gives_in_float32_rounded_once(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str, family_name: str
) -> None:
    family = checkpoints(family_name, dtype=torch.bfloat16)
    plan = {**SPARSE[method][words](family), "dtype": "float32", "out_dtype": "bfloat16"}
    edges = at_an_edge(plan)
    for merged in merge_by_both(peer, family, plan):
        assert merged.ours.dtype == merged.theirs.dtype == torch.bfloat16
        edge = edges[merged.name]
        near = 2**-8 + 4 * edge.share if edge.share else NEAR
        beyond = (units_apart(merged) > 1) & (relative_distance(merged) >= near) & ~edge.mask
        assert not beyond.any(), f"{merged.name}: {int(beyond.sum())} elements"
    numel = sum(edge.mask.numel() for edge in edges.values())
    assert sum(int(edge.mask.sum()) for edge in edges.values()) < FEW * numel


def exact(plan: Plan) -> dict[str, Tensor]:
    """Return the merge by the plain float64 form of each operator, from the stored values."""
    base = tensors_of(Path(plan["base_model"]))
    tuned = [tensors_of(Path(entry["model"])) for entry in plan["models"]]
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        tasks = {task.name: task for task in merged.resolution.tasks}
    found = {}
    for name, task in tasks.items():
        assert task.operator is not None
        values = base[name].double()
        others = [x[name].double() for x in tuned]
        found[name] = values + task.operator.reference(values, others, task.about())
    return found


@pytest.mark.parametrize("method", SPARSE)
def test_of_bfloat16_models_ours_is_the_nearer_to_float64(
    peer: Peer, checkpoints: Checkpoints, method: str
) -> None:
    family = checkpoints("llama", dtype=torch.bfloat16)
    plan = next(iter(SPARSE[method].values()))(family)
    plan |= {"dtype": "bfloat16", "out_dtype": "bfloat16"}
    plain, apart = exact(plan), torch.zeros(2, dtype=torch.float64)
    for merged in merge_by_both(peer, family, plan):
        for i, values in enumerate((merged.ours, merged.theirs)):
            apart[i] += (values.double() - plain[merged.name]).square().sum()
    assert apart[0] < apart[1]


def test_sce_keeps_the_places_that_float64_keeps_where_the_peer_loses_them_to_rounding(
    peer: Peer, tmp_path: Path
) -> None:
    example = tiny_llama(tmp_path / "example")
    draw = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in tensors_of(example).items()}
    base = {name: 1.0 + torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    paths = [tmp_path / "base", tmp_path / "one", tmp_path / "two"]
    middle = {name: 0.01 * torch.randn(x.shape, generator=draw) for name, x in base.items()}
    for path in paths:  # the models are far from the base, and near one another
        near = {n: x + 1e-5 * torch.randn(x.shape, generator=draw) for n, x in middle.items()}
        write_checkpoint(path, base if path == paths[0] else near)
        shutil.copy(example / "config.json", path)
    plan = {
        "merge_method": "sce",
        "base_model": str(paths[0]),
        "models": [{"model": str(path)} for path in paths[1:]],
        "parameters": {"select_topk": 0.5},
        "dtype": "float32",
    }
    plain, ours, theirs = exact(plan), our_merge(plan), peer.merge(plan)
    lost = [
        sum(int(((got[n] != base[n]) != (plain[n] != base[n].double())).sum()) for n in plain)
        for got in (ours, theirs)
    ]
    assert lost[0] < lost[1]
