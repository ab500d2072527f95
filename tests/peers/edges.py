"""What two implementations may choose otherwise: elements at the edge of what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mergekit_ft
from mergekit_ft.algebra.outliers import ranks_kept
from mergekit_ft.contract import Operator
from mergekit_ft.methods.breadcrumbs import Breadcrumbs
from mergekit_ft.methods.breadcrumbs_ties import BreadcrumbsTies
from mergekit_ft.methods.sce import Sce
from tests.peers.peer import Plan, tensors_of, text_of

EDGE = 1e-5  # of a variance


class Edge(NamedTuple):
    """What the two may choose otherwise in a tensor."""

    mask: Tensor  # bool, of its shape
    share: float  # of the squares of all deltas, where the models' weights depend on the choice


def at_an_edge(plan: Plan) -> dict[str, Edge]:
    """Return, by tensor, where an element may be kept by the one and not by the other."""
    base = tensors_of(Path(plan["base_model"]))
    tuned = [tensors_of(Path(entry["model"])) for entry in plan["models"]]
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        operators = {task.name: task.operator for task in merged.resolution.tasks}
    return {
        name: _edge(operators[name], [x[name] - values for x in tuned])
        for name, values in ((name, tensor.float()) for name, tensor in base.items())
    }


def _edge(operator: Operator | None, deltas: Sequence[Tensor]) -> Edge:
    mask = torch.zeros_like(deltas[0], dtype=torch.bool)
    if isinstance(operator, Breadcrumbs | BreadcrumbsTies):
        for delta, *shares in zip(deltas, operator.density, operator.gamma, strict=True):
            for rank in ranks_kept(*shares, delta.numel()):
                mask |= _near_rank(delta.abs(), rank, 0.0)
    if not isinstance(operator, Sce) or operator.select_topk == 1.0:
        return Edge(mask, 0.0)
    doubles = torch.stack([delta.double() for delta in deltas])
    variance = doubles.var(dim=0, correction=0)
    count = math.trunc(int((variance > 0).sum()) * operator.select_topk)
    mask = _near_rank(variance, count, EDGE)
    squares = doubles.square().sum(0)
    kept = squares[variance > variance[mask].max()] if mask.any() else squares
    return Edge(mask, float(squares[mask].sum() / (kept.sum() + squares[mask].sum())))


def _near_rank(values: Tensor, rank: int, near: float) -> Tensor:
    """Return where values are near the one that is the last within the rank."""
    if rank in (0, values.numel()):
        return torch.zeros_like(values, dtype=torch.bool)
    ordered = values.flatten().sort(descending=True).values
    last, following = float(ordered[rank - 1]), float(ordered[rank])
    chosen = last - following <= near * last
    return ((values - last).abs() <= near * last) & chosen
