"""Which entries of a model's delta count as changed, and in how many models each is (RAM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.contract import Block


def changes(block: Block, epsilon: float, count: Tensor, spare: Tensor) -> Tensor:
    """Return (k, n) the deltas, zero up to epsilon, in the memory of the tuned values.

    `count` (n,) becomes the number of models in which an entry changed.
    """
    deltas = subtract_base(block.tuned, block.base)
    for i, delta in enumerate(deltas):
        torch.ops.aten.hardshrink.out(delta, epsilon, out=delta)
        changed = torch.ne(delta, 0, out=spare if i else count)
        if i:
            count.add_(changed)
    return deltas


def reference_changes(base: Tensor, tuned: Sequence[Tensor], epsilon: float) -> Tensor:
    """Return the same deltas, stacked, as a plain expression."""
    deltas = torch.stack([x - base for x in tuned])
    return deltas * (deltas.abs() > epsilon)
