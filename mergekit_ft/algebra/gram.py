"""Models as vectors: their dot products from one pass, and sums of them with k weights.

Whatever stays in the span of k vectors can be worked out in k x k float64 numbers, however long
the vectors are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.cells import cells, exact, totals
from mergekit_ft.algebra.deltas import subtract_base, subtract_weighted, weighted_sum
from mergekit_ft.contract import Block, Measure

Matrix = np.ndarray[Any, np.dtype[np.float64]]
ONE = 1e-12  # weights whose sum is as near to 1 as this add up to 1


def pairs(k: int) -> list[tuple[int, int]]:
    """Return the pairs (i, j) of k models with i <= j, in order."""
    return [(i, j) for i in range(k) for j in range(i, k)]


def vectors(block: Block) -> Tensor:
    """Return (k, n) deltas where there is a base, else values, in the memory of the tuned."""
    return subtract_base(block.tuned, block.base) if block.base.numel() else block.tuned


def measure() -> Measure:
    """Measure the dot products of all pairs of vectors."""
    return Measure(_products, cells=True)


def matrix(rows: Tensor, k: int) -> Matrix:
    """Return the (k, k) Gram matrix from the rows of `measure`."""
    found = np.empty((k, k))
    for (i, j), total in zip(pairs(k), totals(rows), strict=True):
        found[i, j] = found[j, i] = total
    return found


def norm(coefficients: Matrix, gram: Matrix) -> float:
    """Return the norm of a sum of vectors with these coefficients."""
    square = float((coefficients * (gram * coefficients).sum(1)).sum())
    return math.sqrt(max(0.0, square))


def combine(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Return (n,) the sum of weights[i] * rows[i], in the memory of the first row.

    Where the weights add up to 1, equal rows come out bit for bit.
    """
    if abs(math.fsum(weights) - 1.0) > ONE:
        return weighted_sum(rows, weights)
    first, others = rows[0], rows[1:]
    return subtract_weighted(first, torch.sub(first, others, out=others), weights[1:])


def row_products(rows: Sequence[Tensor]) -> Tensor:
    """Return (pairs, m) float64: the dot products along the last axis of k times (m, length)."""
    return torch.stack([exact(rows[i]).mul(exact(rows[j])).sum(-1) for i, j in pairs(len(rows))])


def _products(block: Block) -> Tensor:
    """Return (cells, pairs): the dot products of every cell."""
    found = torch.stack([_of_cell(block, cell) for cell in cells(block.n, block.cell)])
    return torch.stack([found[:, i, j] for i, j in pairs(len(block.tuned))], dim=1)


def _of_cell(block: Block, cell: slice) -> Tensor:
    """Return (k, k) the dot products over a cell."""
    tuned = block.tuned[:, cell]
    rows = exact(tuned - block.base[cell] if block.base.numel() else tuned)
    return rows @ rows.T
