"""MEMIT: each layer's update is the normal equations of what hooks on the whole model measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.small_models import models  # noqa: F401
from tests.solved import ASKED, Seen, given, layer_of, module_of, near, opened, run, second_moment

__all__ = ["given"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memits_updates_are_the_normal_equations_of_what_hooks_measure(
    kind: str, tmp_path: Path, given: dict[int, Tensor]
) -> None:
    base, fresh = opened(tmp_path, kind), opened(tmp_path, kind)
    found = run("memit", base, tmp_path, layers=(0, 1, 2), weight=0.5)
    texts = Seen(fresh, found.facts["contexts"])
    assert len(texts.contexts) == 6
    modules = [module_of(fresh, name) for name in found.held]
    moments = [second_moment(fresh, module, tmp_path) for module in modules]
    leaving = layer_of(fresh, list(found.held)[-1])
    before = [module.weight.detach().clone() for module in modules]
    for left, module, moment in zip((3, 2, 1), modules, moments, strict=True):
        keys = torch.stack([texts.key(module, edit, 0.5) for edit in ASKED], dim=1)
        now = torch.stack([texts.value(leaving, edit) for edit in ASKED], dim=1)
        residual = (given[0] - now) / left
        update = residual @ keys.T @ torch.linalg.inv(0.5 * moment + keys @ keys.T)
        with torch.no_grad():
            module.weight += (update.T if kind == "gpt2" else update).float()
    for made, module, old in zip(found.held.values(), modules, before, strict=True):
        assert near(made.double() - old, module.weight.double() - old, 1e-4)
        assert not torch.equal(made, old)
