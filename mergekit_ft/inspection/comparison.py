"""The weights of two checkpoints side by side, streamed within a budget; sums of what is found."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.distances import BINS, SUMS, Apart, apart
from mergekit_ft.blocks import USUAL, Crew, Job, Piece, Span, Station
from mergekit_ft.contract import CELL
from mergekit_ft.errors import OperatorError
from mergekit_ft.options import Options, Progress
from mergekit_ft.resolution import Ref
from mergekit_ft.sources.dtypes import FLOATING

EACH = 192  # bytes that an element of a block takes, at most


@dataclass(frozen=True)
class Both:
    """A tensor of two checkpoints, of one shape; numbers that are no floats in one dtype."""

    name: str
    a: Ref
    b: Ref

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.a.info.numel

    @property
    def floating(self) -> bool:
        """Say whether distances mean anything."""
        return {self.a.info.dtype, self.b.info.dtype} <= FLOATING

    @property
    def nbytes(self) -> int:
        """Return the bytes that one look at both takes."""
        return self.a.info.nbytes + self.b.info.nbytes


@dataclass
class Totals:
    """What a tensor, or several, come to."""

    numel: int = 0
    floats: int = 0  # elements of floating point, of which all but `changed` is
    finite: int = 0
    changed: int = 0
    agree: int = 0
    sums: tuple[float, ...] = (0.0,) * SUMS  # of a*a, b*b, a*b, (b-a)*(b-a)
    largest: float = 0.0
    bins: Any = field(default_factory=lambda: np.zeros(BINS, np.int64))
    odd: tuple[int, ...] = (0, 0, 0, 0)  # NaN and Inf in A, NaN and Inf in B

    @property
    def relative_norm(self) -> float | None:
        """Return ||b - a|| / ||a||; None where a is zero and b is not."""
        before, moved = self.sums[0], self.sums[3]
        if moved == 0.0:
            return 0.0
        share = moved / before if before else math.inf
        return math.sqrt(share) if math.isfinite(share) else None

    @property
    def cosine(self) -> float | None:
        """Return the cosine of the angle between a and b; None where one of them is zero."""
        before, after, both, moved = self.sums
        if moved == 0.0 and before:
            return 1.0
        lengths = math.sqrt(before) * math.sqrt(after)
        found = both / lengths if lengths else math.nan
        return max(-1.0, min(1.0, found)) if math.isfinite(found) else None

    @property
    def turn(self) -> float | None:
        """Return 1 - cosine, exact where that is near 0; None where a or b is zero."""
        before, after, _, moved = self.sums
        if moved == 0.0 or self.cosine is None:
            return None if self.cosine is None else 0.0
        longer = math.sqrt(after) - math.sqrt(before)
        return max(0.0, (moved - longer * longer) / (2 * math.sqrt(before) * math.sqrt(after)))

    @property
    def changed_share(self) -> float:
        """Return the share of the elements that differ."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def sign_agreement(self) -> float | None:
        """Return the share of the finite elements whose sign is the same; zero is one of three."""
        return self.agree / self.finite if self.finite else None


def added_up(parts: Iterable[Totals]) -> Totals:
    """Return the totals of several tensors; in whatever order, the same to the bit."""
    held = list(parts)
    return Totals(
        sum(part.numel for part in held),
        sum(part.floats for part in held),
        sum(part.finite for part in held),
        sum(part.changed for part in held),
        sum(part.agree for part in held),
        tuple(math.fsum(column) for column in zip(*(part.sums for part in held), strict=True))
        or (0.0,) * SUMS,
        max((part.largest for part in held), default=0.0),
        sum((part.bins for part in held), np.zeros(BINS, np.int64)),
        tuple(sum(column) for column in zip(*(part.odd for part in held), strict=True)) or (0,) * 4,
    )


def compared(pairs: Sequence[Both], options: Options, watcher: Progress) -> dict[str, Totals]:
    """Read every pair once, block by block, and return what each comes to."""
    size = _block_size(options)
    watcher.start(sum(pair.nbytes for pair in pairs), "comparing")
    found: dict[str, Totals] = {}
    crew = Crew(options.workers, torch.device("cpu"))
    crew.run(_job(pair, size, found, watcher) for pair in pairs)
    return {pair.name: found[pair.name] for pair in pairs}


def _block_size(options: Options) -> int:
    """Return the elements of a block, whole cells, so that all workers stay within the budget."""
    least = options.workers * EACH * CELL
    if least > options.memory:
        raise OperatorError(
            f"{options.workers} threads need at least {least:,} bytes of memory, more than the "
            f"{options.memory:,} given; raise --memory or lower --threads"
        )
    return min(USUAL, options.memory // least * CELL)


def _job(pair: Both, size: int, found: dict[str, Totals], watcher: Progress) -> Job:
    """Compare one tensor; its blocks may run side by side and in any order."""
    sums, lock = _Sums(pair), threading.Lock()

    def piece(span: Span) -> Piece:
        def run(station: Station) -> None:
            one, other = station.read(pair.a, span, 0), station.read(pair.b, span, 1)
            part = apart(one, other) if pair.floating else _unlike(one, other)
            with lock:
                sums.add(part)
            watcher.advance(round(pair.nbytes * span.n / pair.numel))

        return run

    yield [
        piece(Span(start, min(start + size, pair.numel))) for start in range(0, pair.numel, size)
    ]
    found[pair.name] = sums.total()


def _unlike(one: Tensor, other: Tensor) -> int:
    """Return how many elements differ, of numbers that are no floats."""
    return int(torch.count_nonzero(one != other))


class _Sums:
    """What the blocks of one tensor come to.

    Rows are kept as Python's floats: small arrays that outlive a block's large ones would lie
    between them, and leave no hole of their size.
    """

    def __init__(self, pair: Both) -> None:
        self._rows: list[list[float]] = []
        self._totals = Totals(pair.numel, pair.numel if pair.floating else 0)

    def add(self, part: Apart | int) -> None:
        """Add a block: how far it is apart, or how many of its elements differ."""
        held = self._totals
        if isinstance(part, int):
            held.changed += part
            return
        self._rows += part.sums.tolist()
        held.finite += part.finite
        held.changed += part.changed
        held.agree += part.agree
        held.largest = max(held.largest, part.largest)
        held.bins += part.bins
        held.odd = tuple(map(sum, zip(held.odd, part.odd, strict=True)))

    def total(self) -> Totals:
        """Return the totals; the rows are added so that their order does not matter."""
        if self._rows:
            self._totals.sums = tuple(map(math.fsum, zip(*self._rows, strict=True)))
        return self._totals
