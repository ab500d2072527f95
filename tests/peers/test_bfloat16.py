"""In bfloat16, every plan gives what mergekit 0.1.5 gives when it computes in float32.

The peer is run with `dtype: float32, out_dtype: bfloat16`. Then both round a float32 result once,
and are at most one unit in the last place apart. Two things are beyond that:

- Where values cancel, what is left may be smaller than the float32 rounding of what went into it,
  and has no last place that means anything. There the bound of test_float32.py holds.
- Where `ties` must choose between equal magnitudes, the two choose otherwise: see
  test_equal_magnitudes.py. Those elements are left out here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_ft
from tests.peers.both import Merged, merge_by_both
from tests.peers.conftest import Checkpoints
from tests.peers.distances import relative_distance, units_apart
from tests.peers.families import MERGED
from tests.peers.peer import Peer, Plan, tensors_of, text_of
from tests.peers.plans import PLANS

pytestmark = pytest.mark.peer

NEAR = 1e-6  # of the largest value that went into an element
FEW = 0.05  # of a model's elements; bfloat16 has 128 magnitudes between powers of two
CASES = [
    pytest.param(method, words, id=f"{method}: {words}")
    for method, plans in PLANS.items()
    for words in plans
]


def bfloat16(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32", "out_dtype": "bfloat16"}


def chosen_among_equals(plan: Plan) -> dict[str, Tensor]:
    """Return, by tensor, where a trimmed magnitude equals the least one kept and one dropped."""
    base, *tuned = (tensors_of(Path(path)) for path in _base_and_tuned(plan))
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        densities = {t.name: getattr(t.operator, "density", ()) for t in merged.resolution.tasks}
    return {
        name: _any(
            values,
            [_equal(x[name] - values, p) for x, p in zip(tuned, densities[name], strict=False)],
        )
        for name, values in ((name, tensor.float()) for name, tensor in base.items())
    }


def _base_and_tuned(plan: Plan) -> list[str]:
    models = [entry["model"] for entry in plan["models"]]
    base = plan.get("base_model", models[0])
    return [base, *(model for model in models if model != base)]


def _any(like: Tensor, masks: Sequence[Tensor]) -> Tensor:
    found = torch.zeros_like(like, dtype=torch.bool)
    for mask in masks:
        found |= mask
    return found


def _equal(delta: Tensor, density: float) -> Tensor:
    count = max(1, math.trunc(density * delta.numel()))
    magnitudes = delta.abs().flatten().sort(descending=True).values
    chosen = 0 < density < 1 and bool(magnitudes[count - 1] == magnitudes[count])
    return (delta.abs() == magnitudes[count - 1]) & chosen


def beyond_one_unit(merged: Merged) -> Tensor:
    """Return where the two differ by more than one unit in the last place."""
    return (units_apart(merged) > 1) & (relative_distance(merged) >= NEAR)


@pytest.mark.parametrize("family_name", MERGED)
@pytest.mark.parametrize(("method", "words"), CASES)
def test_a_plan_gives_what_the_peer_gives_in_float32_rounded_once(
    peer: Peer, checkpoints: Checkpoints, method: str, words: str, family_name: str
) -> None:
    family = checkpoints(family_name, dtype=torch.bfloat16)
    plan = bfloat16(PLANS[method][words](family))
    choices = chosen_among_equals(plan)
    merged = list(merge_by_both(peer, family, plan))
    for one in merged:
        assert one.ours.dtype == one.theirs.dtype == torch.bfloat16
        beyond = beyond_one_unit(one) & ~choices[one.name]
        assert not beyond.any(), f"{one.name}: {int(beyond.sum())} elements"
    numel = sum(one.ours.numel() for one in merged)
    cancelled = sum(int((units_apart(one) > 1).sum()) for one in merged if method != "ties")
    assert cancelled < 0.001 * numel
    assert sum(int(choice.sum()) for choice in choices.values()) < FEW * numel
