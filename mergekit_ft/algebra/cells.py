"""Reductions that neither block size nor threads can move: float64 sums over fixed cells.

Where a cell's many numbers are only added up, eight float32 ones make one float64 number: that
errs by at most 2^-21 of what they add up to (by 10^-9 where there are many), and costs a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from mergekit_ft.contract import CELL

GROUP = 8  # numbers added up in their own dtype


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


def added(values: Tensor, cell: int = CELL) -> Tensor:
    """Return (..., cells) float64 the sums of the cells of (..., n) values."""
    n = values.shape[-1]
    whole = n // cell * cell
    parts = []
    if whole:
        parts.append(_added(values.narrow(-1, 0, whole).view(*values.shape[:-1], -1, cell)))
    if whole < n:
        parts.append(_added(values.narrow(-1, whole, n - whole).unsqueeze(-2)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _added(rows: Tensor) -> Tensor:
    """Return the float64 sums along the last axis, GROUP numbers at a time."""
    n = rows.shape[-1]
    even = n // GROUP * GROUP
    grouped = rows.narrow(-1, 0, even).view(*rows.shape[:-1], GROUP, -1)
    found = exact(grouped.sum(-2)).sum(-1)
    return found if even == n else found.add_(exact(rows.narrow(-1, even, n - even)).sum(-1))


def totals(rows: Tensor) -> list[float]:
    """Return the exactly rounded sum of each column of (cells, s)."""
    return [math.fsum(column) for column in rows.T.tolist()]


def l1_norms(vectors: Iterable[Tensor], cell: int = CELL) -> Tensor:
    """Return (cells, s): the L1 norms of s vectors, made one after the other."""
    return torch.stack([added(vector.abs(), cell) for vector in vectors], dim=1)


def restoring_factor(whole: float, part: float) -> float:
    """Return what gives a part of a delta the L1 norm of the whole; 1 if that is no number."""
    return whole / part if min(whole, part) >= 1e-7 and math.isfinite(whole) else 1.0
