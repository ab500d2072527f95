"""The entries of a sparse change, found by their place in the tensor without reading them all."""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.algebra.indices import places
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.delta_file import Change, DeltaFile
from mergekit_ft.sources.dtypes import SIZE, TORCH

CHUNK = 65_536  # codes read at a time


@dataclass(frozen=True)
class _Table:
    """Where each chunk of codes begins: after which place, and after how many entries."""

    before: list[int]
    entries: list[int]


class Entries:
    """The entries of one change; any thread may ask."""

    overhead = CHUNK * (2 * 8 + 4 * 8)  # bytes that a worker may take

    def __init__(self, delta: DeltaFile, change: Change) -> None:
        self._delta, self.change = delta, change
        self._info = change.parts["indices"]
        self._table: _Table | None = None
        self._lock = threading.Lock()

    def within(self, start: int, stop: int) -> tuple[Tensor, int]:
        """Return (m,) the indices in [start, stop), and how many entries come before them."""
        table = self._known()
        chunk = max(0, bisect_right(table.before, start - 1) - 1)
        found: list[Tensor] = []
        first = None
        while chunk < len(table.before) and table.before[chunk] < stop - 1:
            indices = self._indices(chunk, table.before[chunk])
            inside = (indices >= start) & (indices < stop)
            if first is None and bool(inside.any()):
                first = table.entries[chunk] + int(inside.to(torch.int8).argmax())
            found.append(indices[inside])
            chunk += 1
        empty = torch.empty(0, dtype=torch.int64)
        return torch.cat(found) if found else empty, first or 0

    def values(self, part: str, first: int, count: int) -> Tensor:
        """Return (count,) values of a part from an entry on."""
        info = self.change.parts[part]
        width = SIZE[info.dtype]
        data = bytearray(count * width)
        if count:
            self._delta.reader.read_into(info, first * width, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[info.dtype]) if count else _none(info.dtype)

    def _known(self) -> _Table:
        with self._lock:
            if self._table is None:
                self._table = self._surveyed()
            return self._table

    def _surveyed(self) -> _Table:
        """Go through all codes once: they must increase, and stay in the tensor."""
        table = _Table([], [])
        last, entries = -1, 0
        for chunk in range(-(-self._info.numel // CHUNK)):
            table.before.append(last)
            table.entries.append(entries)
            codes = self._codes(chunk)
            if self.change.coding == "gap16":
                self._require(int(codes.min()) >= 0, "a gap is negative")
                last = int(places(codes, last)[-1])
                entries += int((codes != 0).sum())
            else:
                wide = codes.to(torch.int64)
                steps = torch.diff(wide, prepend=wide.new_tensor([last]))
                self._require(int(steps.min()) > 0, "the indices do not increase")
                last, entries = int(wide[-1]), entries + len(wide)
        self._require(entries == self.change.entries, f"{entries} entries were found")
        self._require(last < self.change.numel, f"the last index is {last}")
        return table

    def _require(self, fine: bool, problem: str) -> None:
        if not fine:
            change = self.change
            raise SourceError(
                f"{self._delta.reference}: {change.name}: {problem}; {change.entries} entries of "
                f"a tensor of {change.numel} are recorded: the file is damaged"
            )

    def _codes(self, chunk: int) -> Tensor:
        start, width = chunk * CHUNK, SIZE[self._info.dtype]
        count = min(CHUNK, self._info.numel - start)
        data = bytearray(count * width)
        self._delta.reader.read_into(self._info, start * width, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[self._info.dtype])

    def _indices(self, chunk: int, before: int) -> Tensor:
        codes = self._codes(chunk)
        if self.change.coding != "gap16":
            return codes.to(torch.int64)
        return places(codes, before)[codes != 0]


def _none(dtype: str) -> Tensor:
    return torch.empty(0, dtype=TORCH[dtype])
