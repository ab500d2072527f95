"""Reductions that neither block size nor threads can move: float64 sums over fixed cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from mergekit_ft.contract import CELL


def cells(n: int, cell: int = CELL) -> Iterator[slice]:
    """Yield the runs of at most `cell` elements that n elements fall into."""
    for start in range(0, n, cell):
        yield slice(start, min(start + cell, n))


def by_cell(n: int, reduce: Callable[[slice], list[Tensor]], cell: int = CELL) -> Tensor:
    """Return (cells, s) float64: the s numbers that `reduce` makes of each cell."""
    return torch.stack([torch.stack(reduce(run)) for run in cells(n, cell)])


def exact(values: Tensor) -> Tensor:
    """Return the values in float64, which MPS does not have: there, in host memory."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def l1(values: Tensor) -> Tensor:
    """Return the sum of |values| in float64."""
    return exact(values.abs()).sum()


def count_ones(values: Tensor) -> Tensor:
    """Return how many ones are among ones and zeros; torch adds much faster than it counts."""
    exact_in_float = values.numel() <= 2**24
    return values.sum().long() if exact_in_float else torch.count_nonzero(values)


def totals(rows: Tensor) -> list[float]:
    """Return the exactly rounded sum of each column of (cells, s)."""
    return [math.fsum(column) for column in rows.T.tolist()]


def l1_norms(n: int, vectors: Iterable[Tensor], cell: int = CELL) -> Tensor:
    """Return (cells, s): the L1 norms of the s vectors of n elements, one after the other."""

    def norms(vector: Tensor) -> Tensor:
        return by_cell(n, lambda run: [l1(vector[run])], cell)

    return torch.cat([norms(vector) for vector in vectors], dim=1)


def sums(n: int, vectors: Iterable[Tensor]) -> Tensor:
    """Return (cells, s): the sums of the s vectors of n elements, in float64."""

    def of(vector: Tensor) -> Tensor:
        return by_cell(n, lambda run: [exact(vector[run]).sum()])

    return torch.cat([of(vector) for vector in vectors], dim=1)


def restoring_factor(whole: float, part: float) -> float:
    """Return what gives a part of a delta the L1 norm of the whole; 1 if that is no number."""
    return whole / part if min(whole, part) >= 1e-7 and math.isfinite(whole) else 1.0
