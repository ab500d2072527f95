"""SaRA: the entries near zero, the penalty, and the step at which they are chosen again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mergekit_ft.layers import Place
from mergekit_ft.learning import Selection, Subject
from mergekit_ft.methods.sara import Sara
from tests.tuned import (
    Batch,
    DenseAdamW,
    gradients,
    largest_difference,
    model_of,
    plan,
    recorded,
    trained,
    weights,
)

__all__ = ["recorded"]


def test_sara_is_adamw_on_the_small_entries_with_the_nuclear_norm_of_one_matrix(
    tmp_path: Path, recorded: list[Batch]
) -> None:
    words = plan(tmp_path, {"sara": {"tau": 5e-3, "rank_loss": 0.0}}, steps=8, weight_decay=0.1)
    made = trained(words, tmp_path / "out")
    base = weights(model_of(tmp_path / "base"))
    model = model_of(tmp_path / "base")
    masks = {name: p.abs() < 5e-3 for name, p in base.items()}
    optimizer = DenseAdamW(masks, 1e-3, 0.1)
    for t, batch in enumerate(recorded[:8], start=1):
        optimizer.step(model, gradients(model, [batch]))
        if t == 4:  # half of the steps: what grew stops
            held = weights(model)
            optimizer.masks = {n: masks[n] & (held[n].abs() < 5e-3) for n in masks}
            before = sum(int(mask.sum()) for mask in masks.values())
            assert sum(int(mask.sum()) for mask in optimizer.masks.values()) < before
    assert largest_difference(weights(model), made) < 1e-6
    for name, mask in masks.items():
        assert torch.equal(made[name][~mask], base[name][~mask])  # weight decay or not


def test_the_nuclear_norms_slope_is_that_of_the_masked_matrix() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(70, 80, bias=False).double()
    weight = layer.weight
    indices = (weight.detach().abs().flatten() < 0.06).nonzero().flatten()
    subject = Subject(
        torch.nn.Sequential(layer),
        {"0.weight": weight},
        {"0.weight": Place()},
        10,
        0,
        lambda name: weight.detach(),
        lambda size: iter(()),
    )
    now = Selection(entries={"0.weight": indices})
    found = Sara(rank_loss=0.5).penalties(subject, 0, 1, now)["0.weight"]

    def norm(values: Tensor) -> Tensor:
        masked = torch.zeros(weight.numel(), dtype=torch.float64)
        masked[indices] = values
        return torch.linalg.svdvals(masked.view(80, 70)).sum()

    values = weight.detach().flatten()[indices].clone().requires_grad_()
    (0.5 * norm(values)).backward()
    assert torch.allclose(found.double(), values.grad, atol=1e-5)
