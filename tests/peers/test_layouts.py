"""Stages and mixtures of experts by both toolkits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

import mergekit_ft
from tests.checkpoints import tiny_llama, write_checkpoint
from tests.peers.mixtures import fused, tiny_mixtral
from tests.peers.peer import Peer, tensors_of

pytestmark = pytest.mark.peer
CLOSE = 1e-6  # relative to the tensor's largest value


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def document(name: str | None, method: str, base: str | None, *models: str, **more: Any) -> Any:
    parameters = {"weight": 0.6, "density": 0.5} if method == "ties" else {"weight": 0.6}
    entries = [{"model": m} | ({} if "t" in more else {"parameters": parameters}) for m in models]
    plan: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32"}
    plan |= {"base_model": base} if base else {}
    plan |= {"parameters": more} if more else {}
    return plan | ({"name": name} if name else {})


def ours(*documents: Any) -> dict[str, Tensor]:
    with mergekit_ft.open_plan(yaml.safe_dump_all(documents, sort_keys=False)) as merged:
        return dict(merged.items())


def test_stages_are_the_peers_merges_one_after_the_other(peer: Peer, tmp_path: Path) -> None:
    base, one, other = (str(tiny_llama(tmp_path / f"m{seed}", seed=seed)) for seed in range(3))
    stages = [
        document("first", "ties", base, one, other),
        document("second", "linear", None, one, other),
    ]
    last = document(None, "slerp", "first", "second", t=0.4)
    config = json.loads(Path(base, "config.json").read_text())
    for stage in stages:
        made = peer.merge({key: value for key, value in stage.items() if key != "name"})
        write_checkpoint(tmp_path / stage["name"], made, config=config)
    on_disk = {name: str(tmp_path / name) for name in ("first", "second")}
    theirs = peer.merge(
        {**last, "base_model": on_disk["first"], "models": [{"model": on_disk["second"]}]}
    )
    found = ours(last, *stages)
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert apart(tensor, theirs[name]) <= CLOSE, name


def test_a_mixture_keeps_its_layout_where_the_peer_changes_it(peer: Peer, tmp_path: Path) -> None:
    base, one, other = (str(tiny_mixtral(tmp_path / f"m{seed}", seed)) for seed in range(3))
    plan = document(None, "task_arithmetic", base, one, other)
    theirs, found = peer.merge(plan), ours(plan)
    assert found.keys() == tensors_of(Path(base)).keys()
    assert found.keys() != theirs.keys()
    found = fused(found)
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert apart(tensor, theirs[name]) <= CLOSE, name


def test_a_fused_model_merges_into_a_base_of_experts_apart(peer: Peer, tmp_path: Path) -> None:
    base, one = (str(tiny_mixtral(tmp_path / f"m{seed}", seed)) for seed in range(2))
    plan = document(None, "task_arithmetic", base, one)
    theirs = peer.merge(plan)
    config = json.loads(Path(one, "config.json").read_text())
    other = write_checkpoint(tmp_path / "fused", fused(tensors_of(Path(one))), config=config)
    found = fused(ours(document(None, "task_arithmetic", base, str(other))))
    for name, tensor in found.items():
        assert apart(tensor, theirs[name]) <= CLOSE, name
