"""LT-SFT: what moved most, rewound, and tuned alone."""

from __future__ import annotations

from pathlib import Path

import torch

from mergekit_ft.layers import Place
from mergekit_ft.learning import Selection, Subject
from mergekit_ft.methods.lt_sft import LtSft
from tests.tuned import (
    Batch,
    DenseAdamW,
    everywhere,
    gradients,
    largest_difference,
    model_of,
    plan,
    recorded,
    trained,
    weights,
)

__all__ = ["recorded"]


def test_lt_sft_keeps_what_moved_most_and_tunes_it_from_the_base_again(
    tmp_path: Path, recorded: list[Batch]
) -> None:
    words = plan(tmp_path, {"lt_sft": {"k": 500}}, weight_decay=0.1)
    made = trained(words, tmp_path / "out")
    base = weights(model_of(tmp_path / "base"))
    model = model_of(tmp_path / "base")
    dense = DenseAdamW({n: m for n, m in everywhere(model).items() if "norm" not in n}, 1e-3, 0.1)
    first, second = recorded[:6], recorded[6:]
    for batch in first:
        dense.step(model, gradients(model, [batch]))
    moved = {
        name: (p - base[name]).abs()
        for name, p in weights(model).items()
        if "norm" not in name and name != "lm_head.weight"
    }
    line = torch.cat([part.flatten() for part in moved.values()]).sort(descending=True).values[499]
    masks = {name: part >= line for name, part in moved.items()}
    masks["lm_head.weight"] = torch.ones_like(base["lm_head.weight"], dtype=torch.bool)
    model = model_of(tmp_path / "base")
    sparse = DenseAdamW(masks, 1e-3, 0.1)
    for batch in second:
        sparse.step(model, gradients(model, [batch]))
    changed = {n: made[n] != base[n] for n in base}
    assert sum(int(c.sum()) for n, c in changed.items() if n != "lm_head.weight") == 500
    for name in base:
        assert not bool((changed[name] & ~masks.get(name, torch.zeros(()).bool())).any()), name
    assert largest_difference(weights(model), made) < 1e-6


def test_lt_sft_pulls_towards_the_base_once_a_step() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    subject = Subject(
        torch.nn.Module(),
        {"w": weight},
        {"w": Place()},
        10,
        0,
        lambda name: torch.tensor([1.0, 0.0, 1.0, 5.0]),
        lambda size: iter(()),
    )
    tuner = LtSft(k=2, l1=8.0)
    whole = tuner.penalties(subject, 0, 1, Selection(whole=("w",)))["w"]
    assert whole.tolist() == [0.0, -2.0, 2.0, -2.0]  # 8 / 4 times the sign
    some = Selection(entries={"w": torch.tensor([1, 3], dtype=torch.int32)})
    assert tuner.penalties(subject, 1, 1, some)["w"].tolist() == [-2.0, -2.0]
