"""The k largest magnitudes of a vector too long to hold, found without sorting it.

Mostly a bracket finds the k-th (`bracket.py`). Where it does not, counting does, whatever the
values: the bits of a non-negative float, read as an integer, order as the float does. Two passes
(four in float64) count the bits into 65,536 bins, each within the bin that holds the k-th; a last
one counts, cell by cell, the elements that equal it. Of equal ones the lowest indices are kept.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ft.algebra import bracket
from mergekit_ft.algebra.bracket import Deltas
from mergekit_ft.algebra.cells import by_cell, exact
from mergekit_ft.contract import CELL, About, Block, Measure

DIGIT = 16  # bits that one pass settles
EVERY_CELL = 2**62


def scratch(k: int) -> int:
    """Return the rows that a selection takes: deltas and magnitudes, and 64-bit integers."""
    return max(6, 1 + k)


class Cut(NamedTuple):
    """Which elements are kept: all above `threshold`, and the first of those equal to it."""

    threshold: float  # the k-th largest magnitude
    below: float  # the next float under it
    cell: int  # in earlier cells all equal ones are kept, in later ones none
    quota: int  # how many are kept in this cell


Selection = Generator[tuple[Measure, ...], tuple[Tensor, ...], list[Cut | None]]
Alongside = Generator[tuple[Measure, ...], tuple[Tensor, ...], tuple[list[Cut | None], Tensor]]
Counting = Generator[tuple[Measure, ...], tuple[Tensor, ...], dict[int, Cut]]


def count_for(density: float, numel: int) -> int | None:
    """Return how many of `numel` elements are kept, at least one; None for all and for none."""
    return None if density in (0.0, 1.0) else max(1, math.trunc(density * numel))


def largest(
    counts: Sequence[int | None],
    deltas: Deltas,
    about: About,
    each: int = 1,
    signed: bool = True,
) -> Selection:
    """Find the cut of the counts[i] largest magnitudes of a model; no cut where that is None.

    A model has `each` counts in a row. Not `signed` says that its deltas are magnitudes already.
    """
    bits = about.bits
    ranks = {i: count for i, count in enumerate(counts) if count is not None}
    cuts: list[Cut | None] = [None] * len(counts)
    if not ranks:
        return cuts
    found = yield from bracket.find(ranks, deltas, about, each, signed)
    for i, (threshold, cell, quota) in found.items():
        cuts[i] = _cut(threshold, bits, EVERY_CELL if cell is None else cell, quota)
    rest = {i: rank for i, rank in ranks.items() if i not in found}
    if rest:
        counted = yield from _by_counting(rest, lambda block, i: deltas(block, i // each), bits)
        for i, cut in counted.items():
            cuts[i] = cut
    return cuts


def alongside(search: Selection, measure: Measure) -> Alongside:
    """Make a measure in the first whole pass of a selection; return the cuts, and its total."""
    made: Tensor | None = None
    measures = next(search)
    while True:
        if made is None and all(asked.every == 1 for asked in measures):
            made, *found = yield (measure, *measures)
        else:
            found = list((yield measures))
        try:
            measures = search.send(tuple(found))
        except StopIteration as stop:
            assert made is not None  # the last pass of a selection is a whole one
            return stop.value, made


def _by_counting(ranks: dict[int, int], deltas: Deltas, bits: int) -> Counting:
    """Find cuts by counting digits of the magnitudes' bits, whatever the values are."""
    chosen, left = list(ranks), list(ranks.values())
    floors = [0] * len(chosen)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        (bins,) = yield (_histograms(chosen, list(floors), deltas, shift),)
        for row, counted in enumerate(bins):
            digit, left[row] = _digit_of_rank(counted, left[row])
            floors[row] += digit << shift
    thresholds = [_as_float(floor, bits) for floor in floors]
    (equal,) = yield (_equals(chosen, thresholds, deltas),)
    return {
        i: _cut(thresholds[row], bits, *_last_equal(equal[:, row], left[row]))
        for row, i in enumerate(chosen)
    }


def keep(values: Tensor, cut: Cut, first_cell: int, cell: int = CELL) -> Tensor:
    """Set to zero, in place, what the cut does not keep of a block's (n,) values."""
    boundary = (cut.cell - first_cell) * cell
    start, stop = (min(max(edge, 0), values.numel()) for edge in (boundary, boundary + cell))
    _shrink(values[:start], cut.below)
    _shrink(values[stop:], cut.threshold)
    middle = values[start:stop]
    if middle.numel():
        equal = middle.abs() == cut.threshold
        middle.masked_fill_(equal & (equal.cumsum(0) > cut.quota), 0.0)
        _shrink(middle, cut.below)
    return values


def _shrink(values: Tensor, threshold: float) -> None:
    """Set to zero the values of magnitude at most `threshold`, in place."""
    if values.numel() and threshold >= 0.0:
        torch.ops.aten.hardshrink.out(values, threshold, out=values)


def _histograms(chosen: list[int], floors: list[int], deltas: Deltas, shift: int) -> Measure:
    """Count, for each model, the next digit of the magnitudes that share the floor's digits."""

    def count(block: Block) -> Tensor:
        device = block.scratch.device
        bins = torch.zeros((len(chosen), 2**DIGIT + 2), dtype=torch.int64, device=device)
        index, ones = _longs(block.scratch[2:4]), _longs(block.scratch[4:6]).fill_(1)
        for row, i in enumerate(chosen):
            bits = _magnitude_bits(block, deltas, i).sub_(floors[row])
            digits = bits.bitwise_right_shift_(shift).clamp_(-1, 2**DIGIT).add_(1)
            bins[row].scatter_add_(0, index.copy_(digits), ones)
        return bins[:, 1:-1]

    return Measure(count)


def _longs(rows: Tensor) -> Tensor:
    """Return (n,) 64-bit integers in the memory of two rows of scratch."""
    whole = rows.as_strided((2 * rows.stride(0),), (1,))
    return whole.view(torch.int64)[: rows.shape[1]]


def _magnitude_bits(block: Block, deltas: Deltas, i: int) -> Tensor:
    """Return (n,) integers that order as the magnitudes of model i's deltas, in scratch."""
    magnitude = torch.abs(deltas(block, i), out=block.scratch[1])
    return magnitude.view(torch.int32 if magnitude.dtype == torch.float32 else torch.int64)


def _digit_of_rank(counted: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the rank-th largest, and its rank (from 1) within that bin."""
    at_least = counted.flip(0).cumsum(0).flip(0)  # elements in this bin and above
    digit = int((at_least >= rank).sum()) - 1
    return digit, rank - (int(at_least[digit]) - int(counted[digit]))


def _equals(chosen: list[int], thresholds: list[float], deltas: Deltas) -> Measure:
    """Count, cell by cell, the magnitudes equal to each model's threshold."""

    def column(block: Block, i: int, threshold: float) -> Tensor:
        magnitude = torch.abs(deltas(block, i), out=block.scratch[1])
        equal = torch.eq(magnitude, threshold, out=magnitude)
        return by_cell(block.n, lambda run: [exact(equal[run].sum())], block.cell)

    def count(block: Block) -> Tensor:
        pairs = zip(chosen, thresholds, strict=True)
        return torch.cat([column(block, i, threshold) for i, threshold in pairs], dim=1)

    return Measure(count, cells=True)


def _last_equal(per_cell: Tensor, quota: int) -> tuple[int, int]:
    """Return the cell in which the quota of equal elements runs out, and what is left for it."""
    running = per_cell.cumsum(0)
    if quota >= int(running[-1]):
        return EVERY_CELL, 0
    cell = int((running < quota).sum())
    return cell, quota - int(running[cell]) + int(per_cell[cell])


def _cut(threshold: float, bits: int, cell: int, quota: int) -> Cut:
    """Return a cut at a threshold."""
    integer, real = ("<i", "<f") if bits == 32 else ("<q", "<d")
    (pattern,) = struct.unpack(integer, struct.pack(real, threshold))
    return Cut(threshold, _as_float(pattern - 1, bits), cell, quota)


def _as_float(pattern: int, bits: int) -> float:
    """Return the float with this bit pattern; -1.0 for the pattern under zero."""
    if pattern < 0:
        return -1.0
    integer, real = ("<i", "<f") if bits == 32 else ("<q", "<d")
    return float(struct.unpack(real, struct.pack(integer, pattern))[0])


def reference_keep(values: Tensor, count: int | None) -> Tensor:
    """Return a copy with only the `count` largest magnitudes, of equal ones the first."""
    if count is None:
        return values.clone()
    order = values.abs().sort(descending=True, stable=True).indices[:count]
    kept = torch.zeros_like(values)
    kept[order] = values[order]
    return kept
