"""A step of training is the same however its rows are split into batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ft.learning import Pace, Tuner
from tests.tuned import plan, rows, trained

PAIRS = [
    {"prompt": f"{a}+{a}=", "chosen": f" {2 * a}", "rejected": " no idea at all"} for a in range(8)
]


@pytest.mark.parametrize(
    "objective", ["sft", "dft", "asft", "sft_kl", "f_sft", "dpo", {"weighted": {"tau": 2.0}}]
)
def test_a_step_is_the_same_however_it_is_split(
    objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(self: Tuner, groups: Any, pace: Pace) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=pace.rate)

    monkeypatch.setattr(Tuner, "optimizer", plain)  # so that steps are as large as gradients
    words = [
        {"prompt": f"{a}+{a}=", "completion": f" {2 * a}" * (a + 1), "weight": 0.5 + a / 8}
        for a in range(8)
    ]
    rows(tmp_path, PAIRS if objective == "dpo" else words)
    found = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        size = {"batch": batch, "accumulation": accumulation}
        given = plan(tmp_path, "full", objective=objective, steps=1, learning_rate=1.0, **size)
        given["tuner"] = {"modules": {"train": ["lm_head.weight"]}}
        found.append(trained(given, tmp_path / f"out{batch}")["lm_head.weight"])
    before = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    largest = float((found[0] - before).abs().max())
    for other in found[1:]:
        assert float((found[0] - other).abs().max()) < 1e-6 * max(1.0, largest)
    assert largest > 1e-4
