"""What was found, written as changes of a delta file: as entries, or whole where that is less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.indices import coded, gaps
from mergekit_ft.blocks import Station
from mergekit_ft.contract import CELL
from mergekit_ft.deltas.candidates import (
    Entries,
    Found,
    Spool,
    bits_as_numbers,
    read_pair,
    require_finite,
    same_numbers,
    spans,
)
from mergekit_ft.deltas.cuts import Cut
from mergekit_ft.deltas.pairs import Pair
from mergekit_ft.deltas.reach import Row
from mergekit_ft.deltas.writing import DeltaWriter, Record, coding
from mergekit_ft.resolution import Ref
from mergekit_ft.sources.dtypes import SIZE, TORCH

SMALLER = "so many entries change that the tensor is smaller"
BATCH = 4  # part of a block's elements that are entries written at a time: each takes more bytes
WIDTH = {"gap16": 2, "int32": 4, "int64": 8}  # bytes of an index


@dataclass
class Store:
    """Writes changes into a delta, one tensor after the other."""

    writer: DeltaWriter
    spool: Spool
    size: int  # elements of a block
    advance: Callable[[int], None] = lambda nbytes: None
    allow_non_finite: bool = False
    records: list[Record] = field(default_factory=list)  # without the digests of the base
    whole: dict[str, str] = field(default_factory=dict)  # why a tensor is stored whole
    squares: list[float] = field(default_factory=list)  # of what is kept of the delta, by cell
    entries: int = 0  # kept, whatever they are stored as

    def take(self, found: Found, cut: Cut | None, station: Station) -> Cut | None:
        """Write what a cut keeps of one tensor; return what is left of the cut for the next."""
        held = list(self._batches(found, cut)) if found.count <= self.size // BATCH else None
        entries = codes = 0
        before = -1
        left = cut
        for kept, left in held or self._batches(found, cut):  # noqa: B007, the last one
            if len(kept.places):
                codes += coded(torch.from_numpy(kept.places), before)
                before = int(kept.places[-1])
                entries += len(kept.places)
                self._square(found, kept)
        if entries:
            self.entries += entries
            code = coding(found.pair.numel, codes, entries)
            index = WIDTH[code] * (codes if code == "gap16" else entries)
            if index + 2 * found.width * entries > 2 * found.width * found.pair.numel:
                self._take_whole(found, cut, station)
            else:
                batches = (kept for kept, _ in held or self._batches(found, cut))
                self._write(found, code, entries, batches)
        return left

    def take_whole(self, pair: Pair, station: Station) -> None:
        """Write a tensor whole, unless it is the base's own."""
        if pair.base is not None and self._equal(pair, pair.base, station):
            return
        for part, ref in (("originals", pair.base), ("values", pair.tuned)):
            if ref is not None:
                self._copy(pair, part, ref, station)
        self._record_whole(pair, pair.tuned, pair.why)

    def _copy(self, pair: Pair, part: str, ref: Ref, station: Station) -> None:
        """Copy a tensor into a part, which an empty one has too."""
        self._append(pair, part, torch.empty(0, dtype=TORCH[ref.info.dtype]))
        for span in spans(ref.info.numel, self.size):
            raw = station.read(ref, span, 0)
            if not self.allow_non_finite:
                require_finite(ref, span, raw)
            self._append(pair, part, raw)
            self.advance(raw.nbytes)

    def _batches(self, found: Found, cut: Cut | None) -> Iterator[tuple[Entries, Cut | None]]:
        """Yield what is kept of some runs at a time, placed in the tensor, and the cut left."""
        held: list[Entries] = []
        for run in found.runs:
            kept, cut = _kept(self.spool.get(run, found), cut, run.start)
            held.append(kept)
            if sum(len(entries.places) for entries in held) >= self.size // BATCH:
                yield _joined(held), cut
                held = []
        if held:
            yield _joined(held), cut

    def _square(self, found: Found, kept: Entries) -> None:
        """Add up the squares of kept entries by cell; batches are of whole cells."""
        if found.bits:
            cells = (kept.places - kept.places[0] // CELL * CELL) // CELL
            sizes = kept.magnitudes.view(np.float32 if found.bits == 32 else np.float64)
            squares = sizes.astype(np.float64) ** 2
            self.squares += [float(s) for s in np.bincount(cells, weights=squares) if s]

    def _write(self, found: Found, code: str, entries: int, batches: Iterator[Entries]) -> None:
        info, before = found.ref.info, -1
        for kept in batches:
            if not len(kept.places):
                continue
            places = torch.from_numpy(kept.places)
            index = gaps(places, before) if code == "gap16" else places
            index = index.int() if code == "int32" else index
            before = int(places[-1])
            self._append(found.pair, "indices", index)
            self._append(found.pair, "values", _tensor(kept.values, info.dtype))
            self._append(found.pair, "originals", _tensor(kept.originals, info.dtype))
        for name in (found.pair.name, *found.pair.also):
            record = Record(name, "replace", info.dtype, info.shape, None, entries, code)
            self.records.append(record)

    def _take_whole(self, found: Found, cut: Cut | None, station: Station) -> None:
        """Write the whole tensor, with what the cut keeps put in."""
        runs = {run.start: run for run in found.runs}
        for span in spans(found.pair.numel, self.size):
            base, tuned = read_pair(found.pair, span, station)
            self._append(found.pair, "originals", base)
            if found.full:
                self._append(found.pair, "values", tuned)
                continue
            if span.start in runs:
                kept, cut = _kept(self.spool.get(runs[span.start], found), cut, 0)
                bits_as_numbers(base)[kept.places] = kept.values
            self._append(found.pair, "values", base)
        self._record_whole(found.pair, found.ref, SMALLER)

    def _record_whole(self, pair: Pair, becomes: Ref, why: str) -> None:
        info = becomes.info
        shapes = {"values": info.shape}
        if pair.base is not None:
            shapes["originals"] = pair.base.info.shape
        for name in (pair.name, *pair.also):
            record = Record(name, "dense", info.dtype, info.shape, None, info.numel, shapes=shapes)
            self.records.append(record)
            self.whole[name] = why

    def _append(self, pair: Pair, part: str, values: Tensor) -> None:
        for name in (pair.name, *pair.also):
            self.writer.append(name, part, values)

    def _equal(self, pair: Pair, base: Ref, station: Station) -> bool:
        if (base.info.dtype, base.info.shape) != (pair.tuned.info.dtype, pair.tuned.info.shape):
            return False
        pieces = (read_pair(pair, span, station) for span in spans(pair.numel, self.size))
        return all(same_numbers(*map(bits_as_numbers, both)) for both in pieces)


def _kept(entries: Entries, cut: Cut | None, start: int) -> tuple[Entries, Cut | None]:
    """Return what a cut keeps of a run, its places counted from `start`, and the cut left."""
    places = entries.places.astype(np.int64) + start
    if cut is None:
        return entries._replace(places=places), None
    kept, left = cut.kept(entries)
    parts = (part[kept] for part in (places, *entries[1:]))
    return Entries(*parts), left


def _joined(held: list[Entries]) -> Entries:
    return Entries(*(np.concatenate(parts) for parts in zip(*held, strict=True)))


def _tensor(numbers: Row, dtype: str) -> Tensor:
    """Return the values that these bits stand for."""
    signed = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[SIZE[dtype]]
    return torch.from_numpy(numbers.view(signed)).view(TORCH[dtype])


def with_digests(records: list[Record], digests: Mapping[str, str]) -> list[Record]:
    """Return records that say which bytes of the base they are changes of."""
    return [replace(record, sha256=digests.get(record.name)) for record in records]
