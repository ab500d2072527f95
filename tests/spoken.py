"""What a model may have said at a few places, and its probabilities by the definition."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mergekit_ft import registry
from mergekit_ft.learning import Said

N, V = 7, 11


def said(seed: int = 0, *, reference: bool = True) -> Said:
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=dice, dtype=torch.float64) * 2
    before = torch.randn(N, V, generator=dice, dtype=torch.float64) * 2
    targets = torch.randint(V, (N,), generator=dice)
    rows_of = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    weights = torch.tensor([1.0, 1, 0.5, 0.5, 2, 1.5, 1.5], dtype=torch.float64)
    return Said(logits, targets, weights, rows_of, before if reference else None)


def probabilities(logits: Tensor) -> list[list[float]]:
    """Return softmax by the definition."""
    found = []
    for row in logits.tolist():
        total = sum(map(math.exp, row))
        found.append([math.exp(x) / total for x in row])
    return found


def total(name: str, words: Said, **parameters: Any) -> float:
    return float(registry.of_kind(name, "objective")(**parameters).total(words))


def places(words: Said) -> list[tuple[float, float, list[float], list[float]]]:
    """Return (weight, p of the target, p, p before) of each place."""
    now = probabilities(words.logits)
    assert words.reference is not None
    before = probabilities(words.reference)
    return [
        (float(w), now[i][int(t)], now[i], before[i])
        for i, (w, t) in enumerate(zip(words.weights, words.targets, strict=True))
    ]


def kl(before: list[float], now: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(before, now, strict=True))
