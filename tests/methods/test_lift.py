"""LIFT: the mask of the low-rank part, and an Adam that carries its moments over."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.tuned import (
    Batch,
    gradients,
    largest_difference,
    model_of,
    plan,
    recorded,
    trained,
    weights,
)

__all__ = ["recorded"]


def lift_mask(weight: Tensor, rank: int, low: int) -> Tensor:
    """Return the mask of |W_R|'s k largest entries, by numpy's SVD in float64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    truncated = ((u[:, :low] * s[:low]) @ vh[:low]).abs().flatten()
    k = min(rank * sum(weight.shape), weight.numel())
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[truncated.sort(descending=True, stable=True).indices[:k]] = True
    return mask.view_as(weight)


def test_lift_carries_moments_over_three_refreshes(tmp_path: Path, recorded: list[Batch]) -> None:
    words = plan(
        tmp_path,
        {"lift": {"rank": 4, "filter_rank": 6, "interval": 3}},
        steps=11,
        weight_decay=0.1,
    )
    made = trained(words, tmp_path / "out")
    model = model_of(tmp_path / "base")
    names = [n for n, p in model.named_parameters() if "proj" in n]
    held = dict(model.named_parameters())
    masks = {n: lift_mask(held[n].detach(), 4, 6) for n in names}
    m = {n: torch.zeros_like(held[n]) for n in names}
    v = {n: torch.zeros_like(held[n]) for n in names}
    for t, batch in enumerate(recorded[:11], start=1):
        found = gradients(model, [batch])
        with torch.no_grad():
            for n in names:
                g = torch.where(masks[n], found[n], torch.zeros(()))
                m[n] = torch.where(masks[n], 0.9 * m[n] + 0.1 * g, torch.zeros(()))
                v[n] = torch.where(masks[n], 0.95 * v[n] + 0.05 * g * g, torch.zeros(()))
                step = 1e-3 * (1 - 0.95**t) ** 0.5 / (1 - 0.9**t) * m[n] / (v[n].sqrt() + 1e-6)
                kept = held[n] * (1 - 1e-3 * 0.1)
                held[n].copy_(torch.where(masks[n], kept - step, held[n]))
            if t % 3 == 0:
                masks = {n: lift_mask(held[n].detach(), 4, 6) for n in names}
                m = {n: torch.where(masks[n], m[n], torch.zeros(())) for n in names}
                v = {n: torch.where(masks[n], v[n], torch.zeros(())) for n in names}
    assert largest_difference(weights(model), made) < 1e-6
