"""The k-th largest magnitude by sample, bracket and collect (after Floyd and Rivest 1975).

A sample says between which two values the k-th largest almost surely lies. One pass counts what is
above them and collects what is between. Where the k-th is not there after all, or too many equal
values are, nothing is found, and counting bits must do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.contract import RUN, About, Block, Measure

MOST = 2**26  # elements beyond which too many would be collected
KEPT = 0.5  # bytes that an element takes on average, collected and copied
RUNS, RAREST = 16, 32  # runs that a sample takes at least; of how many it takes one at most
SAMPLE = 2**16  # elements sampled, where the stride between them is neither of
CLOSEST, SPARSEST = 16, 512
ABOVE, WITHIN = -1.0, -2.0  # in place of a magnitude: the index is a count
SIGMAS = 3.0  # of the sample's rank, on either side
ROOM = 4.0  # margins; two are expected, the rest is for equals and for uneven blocks
ROOMY = 1 / 8  # of a block at least, if there is memory: bfloat16 models have popular magnitudes
EACH = 32  # bytes that a collected element takes, and is copied

Row = np.ndarray[Any, np.dtype[Any]]
Deltas = Callable[[Block, int], Tensor]  # (block, model) -> (n,) values, in the first scratch row


class Place(NamedTuple):
    """The k-th largest magnitude, and where the last of its equals is that is kept."""

    threshold: float
    cell: int | None  # None: all equals are kept
    quota: int  # how many are kept in that cell


class Bracket(NamedTuple):
    """An open interval of magnitudes, and the share of a block that may lie in it."""

    low: float = -1.0
    high: float = math.inf
    room: float = 1.0


Found = Generator[tuple[Measure, ...], tuple[Tensor, ...], dict[int, Place]]


def find(
    ranks: dict[int, int], deltas: Deltas, about: About, each: int = 1, signed: bool = True
) -> Found:
    """Return, by its number, the place of each rank-th largest magnitude that a bracket finds.

    A model has `each` numbers in a row. Not `signed` says that its deltas are magnitudes already.
    """
    numel = about.numel
    if numel > MOST or len(ranks) * numel * KEPT > about.spare:
        return {}
    brackets = dict.fromkeys(ranks, Bracket())
    if numel > about.cell:
        every = min(max(1, numel // (RUNS * RUN)), RAREST)
        stride = min(max(numel // SAMPLE // every, CLOSEST // every), SPARSEST) | 1
        models = sorted({i // each for i in ranks})
        (sample,) = yield (_sample(models, deltas, stride, every),)
        ordered = dict(zip(models, map(_ordered, sample.T), strict=True))
        most = about.spare / (EACH * len(ranks) * numel)
        for i, rank in ranks.items():
            brackets[i] = _bracket(ordered[i // each], rank / numel, most)
    collected = yield tuple(
        _collect(i // each, bracket, deltas, signed) for i, bracket in brackets.items()
    )
    exact = torch.float32 if about.bits == 32 else torch.float64
    found: dict[int, Place] = {}
    for (i, rank), rows in zip(ranks.items(), collected, strict=True):
        place = _placed(rows[:, 0].to(exact), rows[:, 1], rank, about.cell)
        if place is not None:
            found[i] = place
    return found


def _sample(models: list[int], deltas: Deltas, stride: int, every: int) -> Measure:
    """Collect every stride-th magnitude of each model, in every so many runs: (m, k)."""

    def sample(block: Block, rows: Tensor) -> Tensor:
        return rows[:, -block.start % stride :: stride].T.clone()

    return Measure(_magnitudes(models, deltas), cells=True, host=sample, every=every)


def _magnitudes(models: list[int], deltas: Deltas) -> Callable[[Block], Tensor]:
    """Return what turns a block into (k, n) magnitudes, in scratch."""

    def magnitudes(block: Block) -> Tensor:
        rows = block.scratch[1 : 1 + len(models)]
        for row, i in zip(rows, models, strict=True):
            torch.abs(deltas(block, i), out=row)
        return rows

    return magnitudes


def _ordered(values: Tensor) -> Tensor:
    """Return host values from the smallest."""
    return torch.from_numpy(np.sort(values.numpy()))  # in a third of the time that torch takes


def _bracket(ordered: Tensor, share: float, most: float) -> Bracket:
    """Return the interval that holds the magnitude above which lies this share of a sample.

    There is room for `most` of a block's elements in it, at most.
    """
    m = ordered.numel()
    margin = SIGMAS * math.sqrt(m * share * (1.0 - share)) + 2.0
    upper, lower = math.floor(share * m - margin), math.ceil(share * m + margin)
    towards = torch.tensor([-1.0, math.inf], dtype=ordered.dtype)
    low = ordered[m - lower].nextafter(towards[0]) if lower <= m else towards[0]
    high = ordered[m - upper].nextafter(towards[1]) if upper >= 1 else towards[1]
    return Bracket(float(low), float(high), min(1.0, most, max(ROOMY, ROOM * margin / m)))


def _largest(values: Tensor, rank: int) -> Tensor:
    """Return the rank-th largest, from 1. Equal values, of which there are many, cost no time."""
    return values.kthvalue(values.numel() + 1 - rank).values


def _collect(i: int, bracket: Bracket, deltas: Deltas, signed: bool) -> Measure:
    """Collect a model's magnitudes within its bracket: (m, 2) float64, magnitude and index.

    Two rows of every block are counts. The device makes the magnitudes, and numpy looks through
    them in host memory: it finds few among many much faster than torch.
    """

    def collect(block: Block, rows: Tensor) -> Tensor:
        return torch.from_numpy(_within(rows[0].numpy(), bracket, block.first_cell * block.cell))

    magnitudes = _magnitudes([i], deltas) if signed else lambda block: deltas(block, i).unsqueeze(0)
    return Measure(magnitudes, cells=True, host=collect)


def _within(row: Row, bracket: Bracket, start: int) -> Row:
    """Return (m, 2): counts, then the magnitudes in the bracket if they are few."""
    above, inside = row >= bracket.high, row > bracket.low
    inside ^= above
    within = np.count_nonzero(inside)
    few = within <= bracket.room * len(row)
    index = np.flatnonzero(inside) if few else np.empty(0, dtype=np.int64)
    found = np.empty((2 + len(index), 2))
    found[0], found[1] = (ABOVE, np.count_nonzero(above)), (WITHIN, within)
    found[2:, 0], found[2:, 1] = row[index], index
    found[2:, 1] += start
    return found


def _placed(values: Tensor, index: Tensor, rank: int, cell: int) -> Place | None:
    """Return the rank-th largest magnitude, and the last of its equals kept, if it is there."""
    above, within = (int(index[values == mark].sum()) for mark in (ABOVE, WITHIN))
    if int((values >= 0).sum()) < within or not above < rank <= above + within:
        return None
    threshold = _largest(values, rank - above)
    equals = index[values == threshold]
    kept = rank - above - int((values > threshold).sum())
    if kept == len(equals):
        return Place(float(threshold), None, 0)
    cells = equals[:kept].div(cell).long()
    return Place(float(threshold), int(cells[-1]), int((cells == cells[-1]).sum()))
