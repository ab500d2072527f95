"""What `--lenient` sets aside has no effect in mergekit 0.1.5 either: both merge without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import mergekit_ft
from mergekit_ft.errors import PlanError
from mergekit_ft.inspection.migration import migrate
from tests.peers.both import pair
from tests.peers.conftest import Checkpoints
from tests.peers.distances import relative_distance
from tests.peers.families import Family
from tests.peers.peer import Peer, Plan, text_of
from tests.peers.plans import plan_of

pytestmark = pytest.mark.peer


def first(plan: Plan, **words: Any) -> None:
    plan["models"][0].update(words)


def own(plan: Plan, **parameters: Any) -> None:
    plan["models"][0]["parameters"].update(parameters)


IDLE: dict[str, Callable[[Plan, Family], Any]] = {  # how words without effect come into a plan
    "unknown key at the top": lambda plan, _: plan.update(modles="oops"),
    "a parameter at the top": lambda plan, _: plan.update(normalize=True),
    "unknown key of a model": lambda plan, _: first(plan, wait=2),
    "layer_range under models": lambda plan, _: first(plan, layer_range=[0, 1]),
    "misspelt parameter": lambda plan, _: plan.update(parameters={"normalise": True}),
    "misspelt parameter of a model": lambda plan, _: own(plan, wieght=9),
    "shared parameter of a model": lambda plan, _: own(plan, normalize=True, **{"lambda": 7}),
    "density": lambda plan, _: own(plan, density=0.1),
    "rescale": lambda plan, _: plan.update(parameters={"rescale": True}),
    "parameters of the base": lambda plan, family: plan["models"].append(
        {"model": family.base, "parameters": {"weight": 3}}
    ),
    "filter that matches nothing": lambda plan, _: own(
        plan, weight=[{"value": 9, "filter": "self_atn"}, {"value": 0.5}]
    ),
    "entry behind one for all": lambda plan, family: own(
        plan, weight=[{"value": 0.5}, {"value": 9, "filter": family.words.feed_forward}]
    ),
    "unknown key of an entry": lambda plan, _: own(plan, weight=[{"value": 0.5, "fliter": "mlp"}]),
    "empty setting": lambda plan, _: (
        own(plan, weight=[]),
        plan.update(parameters={"weight": 0.5}),
    ),
    "setting that all models have of their own": lambda plan, _: plan.update(
        parameters={"weight": 9}
    ),
}


def our_merge(text: str, **options: Any) -> dict[str, Tensor]:
    with mergekit_ft.open_plan(text, **options) as merged:
        return dict(merged.items())


@pytest.mark.parametrize("words", IDLE)
def test_words_without_effect_change_nothing_in_either(
    peer: Peer, checkpoints: Checkpoints, words: str
) -> None:
    family = checkpoints("llama")
    clean = plan_of("task_arithmetic", family, [{"weight": 0.5}, {"weight": 0.25}])
    plan: Plan = yaml.safe_load(text_of(clean))
    IDLE[words](plan, family)
    with pytest.raises(PlanError) as refused:
        our_merge(text_of(plan))
    assert all(fault.aside for fault in refused.value.faults)
    plain, theirs = peer.merge(clean), peer.merge(plan)
    assert all(torch.equal(plain[name], theirs[name]) for name in plain)  # so it is, there
    ours = our_merge(text_of(plan), lenient=True)
    for merged in pair(clean, ours, theirs):
        assert float(relative_distance(merged).max()) < 1e-6, merged.name
    strict = our_merge(migrate(text_of(plan)).text)
    assert all(torch.equal(ours[name], strict[name]) for name in ours)


def test_of_two_like_keys_the_last_counts_in_both(peer: Peer, checkpoints: Checkpoints) -> None:
    family = checkpoints("llama")
    clean = plan_of("task_arithmetic", family, [{"weight": 0.5}])
    text = text_of(clean).replace("      weight: 0.5", "      weight: 9\n      weight: 0.5")
    assert yaml.safe_load(text) == clean  # as mergekit reads it
    for merged in pair(clean, our_merge(text, lenient=True), peer.merge(clean)):
        assert float(relative_distance(merged).max()) < 1e-6, merged.name
