"""theta_0 + sum_i lambda_i phi_i as one delta: supports, products and one member's whole tensors.

Each phi_i is what a member adds (of a replacement: values less originals). Sums are float64, in the
order of the members' digests, so that their order on the command line moves no byte. Without a base
the sum is a change to add, in float32 (float64 where the tensor is); with one it is added to the
base's values, rounded once to their dtype, and goes on and comes off to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.indices import coded, gaps
from mergekit_ft.deltas.candidates import bits_as_numbers
from mergekit_ft.deltas.members import Composition, Member, Term, composed_of, opened
from mergekit_ft.deltas.summary import energy, meetings, notes, shares, words
from mergekit_ft.deltas.sums import Adding, Sum, Tally, as_floats, window_size
from mergekit_ft.deltas.writing import DeltaWriter, Record, coding
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.delta_file import Change
from mergekit_ft.sources.dtypes import CODE, SIZE, TORCH
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.patched import require_base
from mergekit_ft.sources.tiles import one_thread

HELD = 24  # bytes that an entry of a sum takes, held until it is written
COPIED = 4 << 20  # bytes at a time

Run = tuple[Tensor, Tensor, Tensor | None]  # places, values, originals


@dataclass(frozen=True)
class Composed:
    """What a composition holds, and how its members meet."""

    out: Path
    entries: int
    tensors: list[str]  # that change
    members: list[dict[str, Any]]  # weight, entries, share of the squared norm
    meetings: list[dict[str, Any]]  # of two members: entries shared, sign conflicts there
    energy: float | None  # squared norm of the sum, to the sum of the members' own
    whole: list[str]  # taken whole, from the head
    head: str | None
    left_out: dict[str, list[str]]  # by member
    nbytes: int
    notes: list[str] = field(default_factory=list)


def compose(
    terms: Sequence[Term],
    out: str | os.PathLike[str],
    *,
    head: str | None = None,
    base: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Composed:
    """Write the weighted sum of deltas to the delta file `out`; any order gives the same bytes.

    Options are fields of `Options`. Raises `MergekitError` and leaves no `out` behind.
    """
    chosen, watcher = Options(**options), progress or Unwatched()
    with ExitStack() as stack:
        members = opened(terms)
        for member in members:
            stack.callback(member.delta.close)
        found = composed_of(members, head)
        source = None
        if base is not None:
            source = stack.enter_context(open_source(base, offline=chosen.offline))
            _require_base(found, source)
        writer = stack.enter_context(DeltaWriter(Path(out), overwrite=chosen.overwrite))
        stack.enter_context(one_thread())
        return _Composing(found, source, chosen, watcher, writer).run()


def _require_base(found: Composition, base: Source) -> None:
    """Refuse a base that lacks what changes, or is not what the members are changes of."""
    if found.products:
        raise SourceError(
            f"{listed(found.products)}: low-rank products are not entries that replace others; "
            "compose without --base, and put the result on it with `delta apply`"
        )
    missing = [name for name in found.sums if name not in base]
    if missing:
        raise SourceError(f"{base.reference} lacks {listed(missing)}, which the members change")


class _Composing:
    """One composition under way."""

    def __init__(
        self,
        found: Composition,
        base: Source | None,
        options: Options,
        watcher: Progress,
        writer: DeltaWriter,
    ) -> None:
        self.found, self.base = found, base
        self.watcher, self.writer = watcher, writer
        self.lax = options.allow_non_finite
        self.size = window_size(options.memory // 2, len(found.members))
        self.memory = options.memory
        self.held = (
            options.memory // 2 // HELD
        )  # entries; of a tensor with more, sums are made twice
        self.tally = Tally()
        self.records: list[Record] = []
        self.entries = 0

    def run(self) -> Composed:
        """Add up, tensor by tensor, and commit."""
        moved = sum(member.delta.file.size for member in self.found.members)
        self.watcher.start(moved, f"composing {self.writer.path}")
        for name, members in self.found.sums.items():
            self._add(name, members)
        for name, members in self.found.products.items():
            self._concatenate(name, members)
        for name in self.found.whole:
            self._take_whole(name)
        if not self.records:
            raise OperatorError("nothing is left to change: the members cancel each other out")
        self.writer.commit(words(self.found, self.base), self.records)
        return Composed(
            self.writer.path,
            self.entries,
            sorted(record.name for record in self.records),
            shares(self.found, self.tally),
            meetings(self.found, self.tally),
            energy(self.tally),
            self.found.whole,
            self.found.head.name if self.found.head else None,
            self.found.left_out,
            self.writer.path.stat().st_size,
            notes(self.found),
        )

    def _add(self, name: str, members: Sequence[Member]) -> None:
        """Write the sum of entries of one tensor."""
        first = members[0].delta.changes[name]
        if self.base is not None:
            require_base(self.base, first, members[0].delta)
        most = sum(member.delta.changes[name].entries for member in members)
        adding = Adding(name, members, self.size)
        held = list(self._runs(adding, first, self.tally)) if most <= self.held else None
        entries, codes, before = 0, 0, -1
        for places, _, _ in held or self._runs(adding, first, self.tally):
            codes += coded(places, before)
            before, entries = int(places[-1]), entries + len(places)
        if not entries:
            return
        code, before = coding(first.numel, codes, entries), -1
        for places, values, originals in held or self._runs(adding, first, None):
            index = gaps(places, before) if code == "gap16" else places
            before = int(places[-1])
            self.writer.append(name, "indices", index.int() if code == "int32" else index)
            self.writer.append(name, "values", values)
            if originals is not None:
                self.writer.append(name, "originals", originals)
        self._record(first, "add" if self.base is None else "replace", entries, code)
        self.entries += entries
        self._advance(name, members)

    def _runs(self, adding: Adding, change: Change, tally: Tally | None) -> Iterator[Run]:
        """Yield what is written of each window: what is added, or what replaces what."""
        for found in adding.windows(tally):
            run = self._run(adding, found, change)
            self._require_finite(adding.name, run)
            if len(run[0]):
                yield run

    def _run(self, adding: Adding, found: Sum, change: Change) -> Run:
        if self.base is None:
            values = as_floats(found.values, change.dtype == "F64")
            places = torch.from_numpy(found.places)
            if torch.count_nonzero(values) < len(values):
                kept = values != 0.0
                places, values = places[kept], values[kept]
            return places, values, None
        originals = self._originals(self.base, change, found.places)
        alone = adding.alone(found)
        values = alone if alone is not None else _rounded(originals, found.values)
        differ = torch.from_numpy(bits_as_numbers(values) != bits_as_numbers(originals))
        return torch.from_numpy(found.places)[differ], values[differ], originals[differ]

    def _originals(self, base: Source, change: Change, places: np.ndarray[Any, Any]) -> Tensor:
        """Return the base's values at these places of one window."""
        width, start = SIZE[change.dtype], int(places[0])
        data = bytearray((int(places[-1]) + 1 - start) * width)
        base.read_into(change.name, start * width, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[change.dtype])[torch.from_numpy(places - start)]

    def _require_finite(self, name: str, run: Run) -> None:
        finite = run[1].double().isfinite()
        if self.lax or bool(finite.all()):
            return
        at = int(finite.logical_not().nonzero()[0])
        raise OperatorError(
            f"{name}: the members add up to {float(run[1][at])} at element {int(run[0][at])}; "
            "lower the weights, or --allow-non-finite lets it pass"
        )

    def _concatenate(self, name: str, members: Sequence[Member]) -> None:
        """Write the sum of products as one: their factors side by side, with their scales in b."""
        changes = [member.delta.changes[name] for member in members]
        self._require_room(name, changes)
        held = {change.parts[part].dtype for change in changes for part in ("a", "b")}
        dtype = torch.float64 if "F64" in held else torch.float32
        scales = [m.weight * c.scale for m, c in zip(members, changes, strict=True)]
        a = [_factor(m, c, "a") for m, c in zip(members, changes, strict=True)]
        b = [
            _factor(m, c, "b").mul_(scale)
            for m, c, scale in zip(members, changes, scales, strict=True)
        ]
        factors = {"a": torch.cat(a).to(dtype), "b": torch.cat(b, dim=1).to(dtype)}
        for part, factor in factors.items():
            self.writer.append(name, part, factor)
        shapes = {part: tuple(factor.shape) for part, factor in factors.items()}
        first = changes[0]
        record = Record(name, "low_rank", first.dtype, first.shape, first.sha256, first.numel)
        self.records.append(Record(**{**vars(record), "shapes": shapes}))
        self._advance(name, members)

    def _require_room(self, name: str, changes: Sequence[Change]) -> None:
        """Refuse factors that do not fit in memory: twice, in float64."""
        need = 16 * sum(c.parts[part].numel for c in changes for part in ("a", "b"))
        if need > self.memory:
            raise OperatorError(
                f"{name}: the factors of {len(changes)} products need {need:,} bytes of memory, "
                f"more than the {self.memory:,} given; raise --memory"
            )

    def _take_whole(self, name: str) -> None:
        """Copy a tensor that the head holds whole."""
        head = self.found.head
        assert head is not None
        change = head.delta.changes[name]
        if self.base is not None and change.sha256 is not None and name in self.base:
            require_base(self.base, change, head.delta)
        for part, info in change.parts.items():
            for start in range(0, info.nbytes, COPIED):
                data = bytearray(min(COPIED, info.nbytes - start))
                head.delta.reader.read_into(info, start, memoryview(data))
                self.writer.append(name, part, torch.frombuffer(data, dtype=TORCH[info.dtype]))
        shapes = {part: info.shape for part, info in change.parts.items()}
        dense = (change.dtype, change.shape, change.sha256, change.numel)
        self.records.append(Record(name, "dense", *dense, shapes=shapes))
        self._advance(name, [head])

    def _record(self, change: Change, kind: str, entries: int, code: str) -> None:
        of = (change.dtype, change.shape, change.sha256)
        self.records.append(Record(change.name, kind, *of, entries, code))

    def _advance(self, name: str, members: Sequence[Member]) -> None:
        parts = (part for m in members for part in m.delta.changes[name].parts.values())
        self.watcher.advance(sum(part.nbytes for part in parts))


def _factor(member: Member, change: Change, part: str) -> Tensor:
    """Return a factor in float64."""
    info = change.parts[part]
    data = bytearray(info.nbytes)
    member.delta.reader.read_into(info, 0, memoryview(data))
    return torch.frombuffer(data, dtype=TORCH[info.dtype]).reshape(info.shape).double()


def _rounded(originals: Tensor, added: np.ndarray[Any, Any]) -> Tensor:
    """Return originals + what is added, rounded to their dtype; where that is zero, their bits."""
    total = originals.double() + torch.from_numpy(added)
    wide = total if CODE[originals.dtype] == "F64" else total.float()
    return torch.where(torch.from_numpy(added) == 0.0, originals, wide.to(originals.dtype))
