"""AlphaEdit: the paper's equation whole, batch after batch; nothing outside the null space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_models import models  # noqa: F401
from tests.solved import (
    ASKED,
    WIDTH,
    Seen,
    given,
    layer_of,
    module_of,
    near,
    opened,
    run,
    second_moment,
)

__all__ = ["given"]


@pytest.mark.parametrize("batch", [3, 2])
def test_alphaedits_updates_are_the_papers_and_lie_in_the_null_space(
    batch: int, tmp_path: Path, given: dict[int, Tensor]
) -> None:
    base, fresh = opened(tmp_path, "llama"), opened(tmp_path, "llama")
    modules = [module_of(fresh, f"model.layers.{i}.mlp.down_proj.weight") for i in (1, 2)]
    moments = [second_moment(fresh, module, tmp_path) for module in modules]
    threshold = float(torch.linalg.eigvalsh(moments[0])[24])
    words: dict[str, Any] = {"threshold": threshold, "ridge": 0.01, "batch": batch}
    found = run("alphaedit", base, tmp_path, layers=(1, 2), **words)
    texts = Seen(fresh, found.facts["contexts"])
    leaving = layer_of(fresh, list(found.held)[-1])
    before = [module.weight.detach().clone() for module in modules]
    spaces, earlier = [], [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in modules]
    for moment in moments:
        values, vectors = torch.linalg.eigh(moment)
        small = vectors[:, values < threshold]
        spaces.append(small @ small.T)
    for number, start in enumerate(range(0, 3, batch)):
        edits = ASKED[start : start + batch]
        for i, module in enumerate(modules):
            keys = torch.stack([texts.key(module, edit, 0.5) for edit in edits], dim=1)
            now = torch.stack([texts.value(leaving, edit) for edit in edits], dim=1)
            residual, p = (given[number] - now) / (2 - i), spaces[i]
            inner = keys @ keys.T @ p + earlier[i] @ p + 0.01 * torch.eye(WIDTH).double()
            with torch.no_grad():
                module.weight += (residual @ keys.T @ p @ torch.linalg.inv(inner)).float()
        for i, module in enumerate(modules):
            keys = torch.stack([texts.key(module, edit, 0.5) for edit in edits], dim=1)
            earlier[i] += keys @ keys.T
    for made, module, old, p in zip(found.held.values(), modules, before, spaces, strict=True):
        update = made.double() - old
        assert near(update, module.weight.double() - old, 1e-4)
        preserved = torch.eye(WIDTH).double() - p  # the span of the keys that text has
        assert float((update @ preserved).norm()) < 1e-6 * float(made.norm())
