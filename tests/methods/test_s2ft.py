"""S2FT: slices of matrices, by the gradient of where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ft.learning import Pace, Tuner
from mergekit_ft.methods.s2ft import S2ft
from tests.tuned import Batch, gradients, model_of, plan, recorded, trained, weights

__all__ = ["recorded"]


@pytest.mark.parametrize("ratio", ["d_ratio", "u_ratio", "o_ratio", "v_ratio"])
def test_s2ft_trains_slices_by_the_full_gradient_of_where_they_stand(
    ratio: str, tmp_path: Path, recorded: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(self: Tuner, groups: Any, pace: Pace) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=pace.rate)

    monkeypatch.setattr(S2ft, "optimizer", plain)
    ratios = {"d_ratio": 0.0} | {ratio: 0.5}
    words = plan(tmp_path, {"s2ft": ratios}, steps=1, learning_rate=1.0)
    made = trained(words, tmp_path / "out")
    model = model_of(tmp_path / "base")
    base, full = weights(model), gradients(model, recorded[:1])
    projection = {"d": "down", "u": "up", "o": "o", "v": "v"}[ratio[0]]
    units = 0
    for name in base:
        moved = made[name] - base[name]
        if f"{projection}_proj" not in name:
            assert not bool(moved.any()), name
            continue
        axis = 1 if ratio[0] in "do" else 0
        width = 8 if ratio[0] in "ov" else 1  # of a head
        parts = (made[name] != base[name]).movedim(axis, 0).flatten(1).any(1).view(-1, width)
        assert bool((parts.any(1) == parts.all(1)).all())  # whole units
        units += int(parts.any(1).sum())
        mask = parts.any(1).repeat_interleave(width)
        wanted = -full[name] * (mask[None, :] if axis else mask[:, None])
        assert float((moved - wanted).abs().max()) < 1e-7
    assert units == {"d": 48, "u": 48, "o": 4, "v": 2}[ratio[0]]  # half of the pool of two layers
