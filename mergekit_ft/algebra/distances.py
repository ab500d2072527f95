"""How far two tensors are apart: float64 sums over cells, and steps of the stored dtype, exactly.

The numbers that a dtype can hold, in their order, are whole numbers: the bits of those above zero
as they are, of those below zero negated, so that -0 and 0 are one. Their difference is the distance
in units in the last place (ULP): 1 for neighbours, wherever they lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.cells import added

Row = Any  # a numpy array
BINS = 66  # 0, 1, 2, 3-4, 5-8, ...: what 64 bits can be apart
SUMS = 4  # of a*a, b*b, a*b, (b-a)*(b-a)
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Apart(NamedTuple):
    """How far a run of elements of two tensors is apart; NaN and Inf are counted and left out."""

    sums: Tensor  # (cells, SUMS) float64
    finite: int  # elements that are finite in both: all but the first number are of these
    changed: int  # elements, of all, whose bits differ (of two dtypes: whose values do)
    agree: int  # elements of one sign; zero is a sign of its own
    largest: float  # |b - a|
    bins: Row  # (BINS,) int64 elements by their distance in ULP
    odd: tuple[int, int, int, int]  # NaN and Inf in a, NaN and Inf in b


def apart(a: Tensor, b: Tensor) -> Apart:
    """Compare (n,) host floats of two tensors, n of whole cells but for the tensor's end."""
    one, other = _of_one_dtype(a, b)
    mine, theirs = bits(one), bits(other)
    wide = a.double()
    if a.dtype == b.dtype and np.array_equal(mine, theirs):
        return _equal(wide, a.numel())
    also = b.double()
    changed = np.count_nonzero(mine != theirs) if a.dtype == b.dtype else _other(wide, also)
    held = torch.isfinite(wide) & torch.isfinite(also)
    odd = _odd(wide, also)
    if any(odd):
        wide, also = (x.masked_fill(~held, 0.0) for x in (wide, also))
        mine, theirs = mine[held.numpy()], theirs[held.numpy()]
    mine, theirs = ordered(mine), ordered(theirs)
    delta = also - wide
    parts = (wide * wide, also * also, wide * also, delta * delta)
    return Apart(
        torch.stack([added(part) for part in parts], dim=1),
        len(mine),
        int(changed),
        int(np.count_nonzero(np.sign(mine) == np.sign(theirs))),
        float(delta.abs_().max()) if delta.numel() else 0.0,
        binned(distance(mine, theirs)),
        odd,
    )


def _equal(wide: Tensor, numel: int) -> Apart:
    """Return what is known of two runs of the same bits."""
    odd = _odd(wide, wide)
    lost = odd[0] + odd[1]
    if lost:
        wide = wide.masked_fill(~torch.isfinite(wide), 0.0)
    squares = added(wide * wide)
    sums = torch.stack([squares, squares, squares, torch.zeros_like(squares)], dim=1)
    bins = np.zeros(BINS, np.int64)
    bins[0] = numel - lost
    return Apart(sums, numel - lost, 0, numel - lost, 0.0, bins, odd)


def _odd(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """Return how many NaN and Inf are in each of two."""
    found = []
    for values in (a, b):
        sound = int(torch.isfinite(values).sum())
        nan = int(torch.isnan(values).sum()) if sound < values.numel() else 0
        found += [nan, values.numel() - sound - nan]
    return found[0], found[1], found[2], found[3]


def _other(a: Tensor, b: Tensor) -> int:
    """Return how many values differ; NaN is NaN."""
    return int(((a != b) & ~(torch.isnan(a) & torch.isnan(b))).sum())


def _of_one_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the coarser of their dtypes, the first's where they are as wide."""
    if a.dtype == b.dtype:
        return a, b
    coarser = b.dtype if b.dtype.itemsize < a.dtype.itemsize else a.dtype
    return a.to(coarser), b.to(coarser)


def bits(values: Tensor) -> Row:
    """Return the bits of host values as signed whole numbers, in the same memory."""
    return values.view(_SIGNED[values.element_size()]).numpy()


def ordered(numbers: Row) -> Row:
    """Return the bits of floats as whole numbers that order as the floats do."""
    magnitude = numbers & np.iinfo(numbers.dtype).max
    return np.where(numbers < 0, -magnitude, magnitude)


def distance(one: Row, other: Row) -> Row:
    """Return the distances of ordered numbers, unsigned and as wide as they are: none overflows."""
    unsigned = _UNSIGNED[one.dtype.itemsize]
    return np.maximum(one, other).view(unsigned) - np.minimum(one, other).view(unsigned)


def binned(distances: Row) -> Row:
    """Return (BINS,) how many distances are 0, 1, 2, 3-4, 5-8, and so on to the powers of two."""
    found = np.zeros(BINS, np.int64)
    moved = distances[distances != 0]
    found[0] = len(distances) - len(moved)
    if distances.dtype.itemsize <= 2:
        counts = np.bincount(moved)
        places = 1 + _length(np.arange(len(counts), dtype=np.uint64)[1:] - np.uint64(1))
        np.add.at(found, places, counts[1:])
    else:
        found += np.bincount(1 + _length(moved - moved.dtype.type(1)), minlength=BINS)
    return found


def _length(numbers: Row) -> Row:
    """Return how many bits each unsigned number takes; 0 takes none."""
    low = np.frexp((numbers & numbers.dtype.type(0xFFFFFFFF)).astype(np.float64))[1]
    if numbers.dtype.itemsize < 8:
        return low
    high = (numbers >> np.uint64(32)).astype(np.float64)
    return np.where(high > 0, 32 + np.frexp(high)[1], low)


def edges(place: int) -> tuple[int, int]:
    """Return the least and the largest distance that a bin counts."""
    return (place, place) if place < 3 else (2 ** (place - 2) + 1, 2 ** (place - 1))
