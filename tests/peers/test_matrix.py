"""Every method of mergekit 0.1.5, set in every way, gives what mergekit gives.

In float32 a tensor is within 1e-6 of the largest value that went into it; in bfloat16, with the
peer run as `dtype: float32, out_dtype: bfloat16`, within one unit in the last place. Where it is
not, the method's card says why, and against the plain float64 form ours is the nearer. Left out are
elements whose variance is, but for rounding, the last one that `sce` keeps; the models' weights
come from what is kept, so there the rest of a tensor may differ by as much as those elements weigh.

A mixture's experts are fused on disk here, for that is what the peer computes on. Where they lie
apart, a method that reads more than one element at a time reads an expert's here and all experts'
there; the others must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_ft
from mergekit_ft import registry
from mergekit_ft.contract import Operator
from mergekit_ft.resolution import Ref, Task
from tests.peers.both import Merged, merge_by_both, our_merge, their_merge
from tests.peers.conftest import Checkpoints
from tests.peers.dense_plans import DENSE
from tests.peers.distances import relative_distance, units_apart
from tests.peers.edges import Edge, at_an_edge
from tests.peers.matrix import FAMILIES, METHODS, Case, cases
from tests.peers.mixtures import fused
from tests.peers.peer import Peer, Plan, tensors_of, text_of

pytestmark = pytest.mark.peer

NEAR = 1e-6  # of the largest value that went into a tensor
FEW = 0.05  # of a merge's elements may depart

# What may be chosen otherwise: the words of the card that say so.
DEPARTS = {
    "ties": "equal magnitudes",
    "breadcrumbs": "equal magnitudes",
    "breadcrumbs_ties": "equal magnitudes",
    "arcee_fusion": "elements near the threshold",
    "model_stock": "nearly opposite",
    "nuslerp": "nearly opposite",
}
ELEMENTWISE = [  # as the table sets them
    *("linear", "task_arithmetic", "dare_linear", "dare_ties", "della", "della_linear"),
    *("nearswap", "ram", "passthrough"),
]
PLANS = [pytest.param(case, id=" ".join(map(str, case))) for case in cases()]
DENSE_PLANS = [(method, words) for method, plans in DENSE.items() for words in plans]


def float32(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32"}


def bfloat16(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32", "out_dtype": "bfloat16"}


def apart_in_float32(merged: Merged) -> Tensor:
    """Return where the two are further apart than roundings of what went in."""
    scale = max(float(x.double().abs().max()) for x in (merged.theirs, *merged.sources))
    difference = (merged.ours.double() - merged.theirs.double()).abs()
    return difference > NEAR * scale


def apart_in_bfloat16(merged: Merged) -> Tensor:
    """Return where the two are more than one unit apart, and no cancellation is the reason."""
    return (units_apart(merged) > 1) & (relative_distance(merged) >= NEAR)


def require_near(method: str, plan: Plan, merges: Iterator[Merged]) -> None:
    """Require that two merges agree, or that ours is the nearer to float64 where they may not."""
    departed, numel = 0, 0
    exact: dict[str, Tensor] = {}
    edges = at_an_edge(plan) if method == "sce" else {}
    for merged in merges:
        assert merged.ours.dtype == merged.theirs.dtype
        bfloat16 = merged.ours.dtype == torch.bfloat16
        beyond = (apart_in_bfloat16 if bfloat16 else apart_in_float32)(merged)
        numel += beyond.numel()
        if method == "sce":
            beyond &= ~chosen_otherwise(edges[merged.name], merged)
            departed += int(edges[merged.name].mask.sum())
        if not beyond.any():
            continue
        departed += int(beyond.sum())
        assert method in DEPARTS, f"{merged.name}: {int(beyond.sum())} elements"
        exact = exact or in_float64(plan)
        ours, theirs = (
            float((x.double() - exact[merged.name])[beyond].square().sum())
            for x in (merged.ours, merged.theirs)
        )
        assert ours <= theirs, f"{merged.name}: {ours:.1e} from float64, the peer {theirs:.1e}"
    assert departed <= FEW * numel


def chosen_otherwise(edge: Edge, merged: Merged) -> Tensor:
    """Return where a choice at the edge, or the weights that come of it, may be the reason."""
    if not edge.share:
        return edge.mask
    unit = 2**-8 if merged.ours.dtype == torch.bfloat16 else NEAR
    return edge.mask | (relative_distance(merged) < unit + 4 * edge.share)


def in_float64(plan: Plan) -> dict[str, Tensor]:
    """Return the merge by the plain float64 form of each operator, from the stored values."""
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        tasks = list(merged.resolution.tasks)
    return {task.name: _exact(task, task.operator) for task in tasks if task.operator is not None}


def _exact(task: Task, operator: Operator) -> Tensor:
    base = _stored(task.base) if task.base is not None else torch.empty(0, dtype=torch.float64)
    found = operator.reference(base, [_stored(ref) for ref in task.tuned], task.about())
    return found + base if operator.yields_delta and task.base is not None else found


def _stored(ref: Ref) -> Tensor:
    return tensors_of(Path(ref.source.reference))[ref.name].double()


OURS = {  # mergekit has none of them
    "lines",
    "consensus",
    "sparse_compose",
    "intruder_scaling",
    "hft_reset",
    "logit_fusion",
}


def test_the_table_has_every_method_that_the_peer_has() -> None:
    assert set(registry.names("operator")) - OURS == set(METHODS)


@pytest.mark.parametrize("method", DEPARTS)
def test_what_may_be_chosen_otherwise_is_in_the_card(method: str) -> None:
    assert DEPARTS[method] in " ".join(registry.card(method).split())


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("case", PLANS)
def test_in_float32_a_plan_gives_what_the_peer_gives(
    peer: Peer, checkpoints: Checkpoints, case: Case, family_name: str
) -> None:
    family = checkpoints(family_name, layers=2)
    plan = float32(case.plan(family))
    require_near(case.method, plan, merge_by_both(peer, family, plan))


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("case", PLANS)
def test_in_bfloat16_a_plan_gives_what_the_peer_gives_in_float32_rounded_once(
    peer: Peer, checkpoints: Checkpoints, case: Case, family_name: str
) -> None:
    family = checkpoints(family_name, layers=2, dtype=torch.bfloat16)
    plan = bfloat16(case.plan(family))
    require_near(case.method, plan, merge_by_both(peer, family, plan))


@pytest.mark.parametrize(("method", "words"), DENSE_PLANS)
def test_settings_of_one_method_alone_give_what_the_peer_gives(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str
) -> None:
    family = checkpoints("qwen2")
    plan = float32(DENSE[method][words](family))
    require_near(method, plan, merge_by_both(peer, family, plan))
    family = checkpoints("qwen2", dtype=torch.bfloat16)
    plan = bfloat16(DENSE[method][words](family))
    require_near(method, plan, merge_by_both(peer, family, plan))


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_experts_that_lie_apart_merge_as_the_peers_fused_ones(
    peer: Peer, checkpoints: Checkpoints, method: str
) -> None:
    family = checkpoints("mixtral_apart")
    plan = float32(Case(method, "filter", max(METHODS[method].tuned)).plan(family))
    ours, theirs = fused(our_merge(plan)), their_merge(peer, family, plan)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        scale = float(tensor.double().abs().max())
        assert float((ours[name].double() - tensor.double()).abs().max()) <= NEAR * scale, name
