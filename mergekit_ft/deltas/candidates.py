"""Entries that may be in a delta, found block by block and spooled beside the file that is made.

A sample says how large a change must be to have a chance; one pass spools the entries that are. The
guess costs time where it is wrong, and never moves a result.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.cells import added
from mergekit_ft.blocks import USUAL, Crew, Job, Piece, Span, Station
from mergekit_ft.contract import CELL
from mergekit_ft.deltas.pairs import Pair
from mergekit_ft.deltas.reach import Reach, Row
from mergekit_ft.errors import OperatorError, WriteError
from mergekit_ft.passes import finite
from mergekit_ft.resolution import Ref
from mergekit_ft.sources.dtypes import CODE, FLOATING, SIZE
from mergekit_ft.sources.patched import HASHED

BLOCK = 2 * USUAL  # elements where the budget allows: there is little arithmetic for each call
EACH = 128  # bytes that an element of a block takes, at most; twice that in float64
PROBE = 4096  # elements compared first
CLUSTERS, CLUSTER = 512, 4096  # runs that a sample is taken from, about, and their elements
SAMPLED = 2**17  # magnitudes in a sample, about
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Run(NamedTuple):
    """Entries of one block, as they lie in the spool: places, magnitudes, values, originals."""

    start: int  # of the block, in its tensor
    number: int  # of entries
    at: int  # byte in the spool


class Entries(NamedTuple):
    """Entries of one block; bits stand for values, so that none is touched."""

    places: Row  # (c,) int32 within the block
    magnitudes: Row  # (c,) bits of |tuned - base|, which order as they do; (0,) where none is asked
    values: Row  # (c,) bits of the tuned
    originals: Row  # (c,) bits of the base


class Spool:
    """A file without a name: it is gone with the process, whatever becomes of that."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise WriteError(
                f"{folder}: cannot be written to: {error.strerror or error}"
            ) from error

    def put(self, entries: Entries) -> int:
        """Write entries behind the others and return where."""
        data = b"".join(part.tobytes() for part in entries)
        try:
            with self._lock:
                at = self._file.seek(0, 2)
                self._file.write(data)
                return at
        except OSError as error:
            raise WriteError(f"no room for what was found: {error.strerror or error}") from error

    def get(self, run: Run, found: Found) -> Entries:
        """Read a run's entries again."""
        number = found.width
        kinds = (np.int32, BITS[found.bits // 8 or 1], BITS[number], BITS[number])
        sizes = [4 * run.number, found.bits // 8 * run.number, *[number * run.number] * 2]
        data, parts, at = self._read(run.at, sum(sizes)), [], 0
        for kind, size in zip(kinds, sizes, strict=True):
            parts.append(np.frombuffer(data[at : at + size], kind))
            at += size
        return Entries(*parts)

    def magnitudes(self, run: Run, bits: int) -> Row:
        """Read the bits of a run's magnitudes."""
        data = self._read(run.at + 4 * run.number, run.number * bits // 8)
        return np.frombuffer(data, BITS[bits // 8])

    def _read(self, at: int, nbytes: int) -> bytes:
        with self._lock:
            self._file.seek(at)
            return self._file.read(nbytes)

    def close(self) -> None:
        """Let go of what was spooled."""
        self._file.close()


@dataclass
class Found:
    """What was found in one tensor."""

    pair: Pair
    bits: int  # of the floats that differences are taken in; 0: none are taken
    runs: list[Run] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)  # of the delta, by cell
    count: int = 0
    full: bool = False  # so much differs that it will be stored whole: nothing more is spooled

    @property
    def width(self) -> int:
        """Return the bytes of one value."""
        return SIZE[self.ref.info.dtype]

    @property
    def ref(self) -> Ref:
        """Return the base's tensor."""
        assert self.pair.base is not None
        return self.pair.base

    def begin(self) -> None:
        """Forget what was found."""
        self.runs, self.squares, self.count = [], [], 0

    @property
    def energy(self) -> float:
        """Return the sum of the squares of the whole delta."""
        return math.fsum(self.squares)


def bits_of(pairs: Iterable[Pair]) -> int:
    """Return the bits of the floats that differences are taken in: 64 where a tensor has them."""
    infos = [ref.info for pair in pairs for ref in (pair.base, pair.tuned) if ref is not None]
    return 64 if any(info.dtype == "F64" for info in infos) else 32


def block_size(bits: int, memory: int, threads: int) -> int:
    """Return the elements of a block: whole cells, so that all workers stay within the budget."""
    cell, spare = EACH * bits // 32 * CELL, memory // threads - HASHED
    if cell > spare:
        raise OperatorError(
            f"{threads} threads need at least {threads * (cell + HASHED):,} bytes of memory, more "
            f"than the {memory:,} given; raise --memory or lower --threads"
        )
    return min(BLOCK, spare // cell * CELL)


@dataclass
class Search:
    """Looks for entries that may be in a delta."""

    spool: Spool
    crew: Crew
    size: int  # elements of a block
    advance: Callable[[int], None] = lambda nbytes: None
    ranked: bool = False  # only the largest are wanted
    allow_non_finite: bool = False

    def over(self, founds: Sequence[Found], reach: Reach) -> None:
        """Spool the entries of every tensor whose change has a chance."""
        counts = [-(-found.pair.numel // self.size) for found in founds]
        firsts = [0, *accumulate(counts)]
        jobs = zip(founds, firsts, strict=False)
        self.crew.run(self.within(found, reach, first) for found, first in jobs)

    def within(self, found: Found, reach: Reach, first: int = 0) -> Job:
        """Spool the entries of one tensor whose change has a chance; `first` numbers its blocks."""
        found.begin()
        lock = threading.Lock()

        def piece(number: int, span: Span) -> Piece:
            def run(station: Station) -> None:
                squares, entries = self._look(found, span, station, reach, number)
                at = self.spool.put(entries) if entries is not None else 0
                with lock:
                    found.squares += squares
                    if entries is not None:
                        found.runs.append(Run(span.start, len(entries.places), at))
                        found.count += len(entries.places)
                        found.full = found.full or (not self.ranked and _mostly(found))
                self.advance(round(found.pair.nbytes * span.n / found.pair.numel))

            return run

        yield [piece(first + i, span) for i, span in enumerate(spans(found.pair.numel, self.size))]
        found.runs.sort()

    def sampled(self, founds: Sequence[Found]) -> tuple[list[Row], list[list[Piece]]]:
        """Return where a sample's magnitudes will be, and the pieces that take it, by tensor."""
        total = sum(found.pair.numel for found in founds)
        every = max(1, total // (CLUSTERS * CLUSTER))
        stride = max(1, total // every // SAMPLED) | 1
        rows: list[Row] = []
        jobs, first = [], 0
        for found in founds:
            here = _clusters(found.pair.numel, first, every)
            jobs.append([self._sampling(found, span, stride, rows) for span in here])
            first += found.pair.numel
        return rows, jobs

    def _sampling(self, found: Found, span: Span, stride: int, rows: list[Row]) -> Piece:
        def run(station: Station) -> None:
            delta, _ = _delta(*read_pair(found.pair, span, station), station, found.bits)
            rows.append(delta.abs_().numpy()[::stride].copy())

        return run

    def _look(
        self, found: Found, span: Span, station: Station, reach: Reach, number: int
    ) -> tuple[list[float], Entries | None]:
        """Return the squares of a block's delta by cell, and its entries that have a chance."""
        base, tuned = read_pair(found.pair, span, station)
        mine, theirs = bits_as_numbers(base), bits_as_numbers(tuned)
        same = same_numbers(mine, theirs)
        if same or not self.ranked:
            self._require_finite(found.pair, span, tuned)
        if same or found.full:
            reach.tell(number, np.zeros(0))
            return [], None
        if not self.ranked:
            return [], _taken(
                true_places(np.not_equal(mine, theirs)), np.zeros(0, np.uint8), theirs, mine
            )
        delta, scratch = _delta(base, tuned, station, found.bits)
        squares = added(torch.square(delta, out=scratch)).tolist()
        if not all(map(math.isfinite, squares)):
            self._require_finite(found.pair, span, tuned)
            self._require_finite(found.pair, span, base, of_base=True)
        size = delta.abs_().numpy()
        floor = reach.floor(size.dtype.type)
        reaching = size >= floor
        if floor == 0.0 or self.allow_non_finite:  # NaN counts as the largest; -0 differs from 0
            reaching = np.not_equal(mine, theirs) & ~(size < floor)
        index = true_places(reaching)
        sizes = size[index]
        reach.tell(number, sizes)
        return squares, _taken(index, sizes.view(BITS[found.bits // 8]), theirs, mine)

    def _require_finite(
        self, pair: Pair, span: Span, values: Tensor, *, of_base: bool = False
    ) -> None:
        """Refuse NaN and Inf, unless they are allowed, with their place."""
        ref = pair.base if of_base else pair.tuned
        assert ref is not None
        if not self.allow_non_finite:
            require_finite(ref, span, values)


def require_finite(ref: Ref, span: Span, values: Tensor) -> None:
    """Refuse NaN and Inf among a block's values, with their place."""
    if CODE[values.dtype] not in FLOATING or finite(values):
        return
    wide = values.double()
    at = int(wide.isfinite().logical_not().nonzero()[0])
    rounded = "" if CODE[values.dtype] == ref.info.dtype else f", as {CODE[values.dtype]}"
    raise OperatorError(
        f"{ref.source.reference}: {ref.name} holds {float(wide[at])}{rounded} at element "
        f"{span.start + at}; repair the checkpoint, or --allow-non-finite lets it pass"
    )


def spans(numel: int, size: int) -> Iterator[Span]:
    """Yield the spans that a tensor is cut into."""
    for start in range(0, numel, size):
        yield Span(start, min(start + size, numel))


def _clusters(numel: int, first: int, every: int) -> Iterator[Span]:
    """Yield each `every`-th short run of a stream, where it lies in the tensor from `first` on."""
    step = CLUSTER * every
    for at in range(-(first % step), numel, step):
        if at + CLUSTER > 0:
            yield Span(max(at, 0), min(at + CLUSTER, numel))


def read_pair(pair: Pair, span: Span, station: Station) -> tuple[Tensor, Tensor]:
    """Return (n,) a span of the base and of the tuned, both in the base's dtype."""
    assert pair.base is not None
    base, tuned = station.read(pair.base, span, 0), station.read(pair.tuned, span, 1)
    if tuned.dtype != base.dtype:
        tuned = station.stage(2, span.n, base.dtype).copy_(tuned)
    return base, tuned


def _delta(base: Tensor, tuned: Tensor, station: Station, bits: int) -> tuple[Tensor, Tensor]:
    """Return (n,) tuned - base as floats, and (n,) of scratch."""
    dtype = torch.float64 if bits == 64 else torch.float32
    frame = station.frame(1, 1, len(base), dtype)
    return frame.models[0].copy_(tuned).sub_(frame.base.copy_(base)), frame.scratch[0]


def bits_as_numbers(values: Tensor) -> Row:
    """Return the bits of host values as whole numbers, in the same memory."""
    width = values.element_size()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    found: Row = values.view(signed).numpy().view(BITS[width])
    return found


def same_numbers(mine: Row, theirs: Row) -> bool:
    """Say whether all numbers are equal; where they differ, they mostly do so early."""
    return np.array_equal(mine[:PROBE], theirs[:PROBE]) and np.array_equal(mine, theirs)


def _mostly(found: Found) -> bool:
    """Say whether so much of a tensor differs that it is smaller whole: an index takes 2 bytes."""
    return found.count * (2 + 2 * found.width) > 2 * found.width * found.pair.numel


def _taken(index: Row, sizes: Row, values: Row, originals: Row) -> Entries:
    """Return the entries at these places of a block."""
    return Entries(index.astype(np.int32), sizes, values[index], originals[index])


def true_places(mask: Row) -> Row:
    """Return the places of what is true, where that is seldom: eight are looked at at once."""
    if len(mask) % 8:
        return np.flatnonzero(mask)
    groups = np.flatnonzero(mask.view(np.uint64))
    if 16 * len(groups) > len(mask):
        return np.flatnonzero(mask)
    inside = np.flatnonzero(mask.reshape(-1, 8)[groups])
    places: Row = groups[inside >> 3] * 8 + (inside & 7)
    return places
