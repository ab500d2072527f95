"""Modules: what is named trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_ft.learning import Tuner
from tests.tuned import Batch, gradients, model_of, plan, recorded, trained, weights

__all__ = ["recorded"]


def test_clipping_sees_what_trains_alone(tmp_path: Path, recorded: list[Batch]) -> None:
    words = plan(tmp_path, {"modules": {"train": ["model.norm.weight"]}}, steps=1, clip=1e-3)
    words["training"]["learning_rate"] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Tuner, "optimizer", lambda self, groups, pace: torch.optim.SGD(groups, lr=pace.rate)
        )
        made = trained(words, tmp_path / "out")
    model = model_of(tmp_path / "base")
    base, full = weights(model), gradients(model, recorded[:1])
    g = full["model.norm.weight"]
    assert float(g.norm()) > 1e-3
    wanted = base["model.norm.weight"] - 1e-3 * g / g.norm()
    assert torch.allclose(made["model.norm.weight"], wanted, atol=1e-7)
