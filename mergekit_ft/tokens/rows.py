"""A model's aligned tensors, read on demand: runs of rows copied, means computed."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import SIZE
from mergekit_ft.tokens.alignment import MEAN, ZEROS, Alignment, Part

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 16_384  # elements converted or added up at a time


@dataclass(frozen=True)
class Run:
    """Rows of the output that come one after another from one place."""

    start: int
    stop: int
    which: int
    old: int  # the row that the first one is


def runs_of(part: Part) -> list[Run]:
    """Return a model's rows as runs; a mean is a run of its own."""
    which, old = part.which, part.old
    breaks = (np.diff(which) != 0) | ((np.diff(old) != 1) & (which[1:] >= 0))
    breaks |= which[1:] == MEAN
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    stops = [*starts[1:], len(which)]
    return [
        Run(start, stop, int(which[start]), int(old[start]))
        for start, stop in zip(starts, stops, strict=True)
    ]


class AlignedReader:
    """Reads a model whose tensors are aligned by token, from its own rows and other models'."""

    def __init__(
        self,
        me: int,
        sources: Sequence[Source],
        alignment: Alignment,
        names: Mapping[str, int],
    ) -> None:
        self.overhead = 3 * PIECE * 8 + max(s.reader.overhead for s in sources)
        self._me, self._sources, self._alignment = me, sources, alignment
        self._names = names  # of the aligned tensors -> elements of a row
        self._runs = runs_of(alignment.parts[me])
        self._starts = [run.start for run in self._runs]
        self._fillers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        if info.name not in self._names:
            self._sources[self._me].read_into(info.name, start, into)
            return
        size = SIZE[info.dtype]
        for run, first, stop in self._cut(info, start // size, (start + len(into)) // size):
            at = slice(first * size - start, stop * size - start)
            self._fill(info, run, first, stop, into[at])

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Pass on what comes from the model's own tensors as they are."""
        if info.name not in self._names:
            self._sources[self._me].will_need(info.name, start, nbytes)

    def close(self) -> None:
        """Close the model's own source."""
        self._sources[self._me].close()

    def _cut(self, info: TensorInfo, first: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """Yield the runs that a range of elements lies in, and its part of each."""
        width = self._names[info.name]
        at = bisect_right(self._starts, first // width) - 1
        while first < stop:
            run = self._runs[at]
            end = min(stop, run.stop * width)
            yield run, first, end
            first, at = end, at + 1

    def _fill(self, info: TensorInfo, run: Run, first: int, stop: int, into: memoryview) -> None:
        """Fill in the elements [first, stop) of the tensor, which lie in one run."""
        width, size = self._names[info.name], SIZE[info.dtype]
        if run.which == ZEROS:
            into[:] = bytes(len(into))
            return
        source = self._sources[run.which] if run.which >= 0 else None
        name = source.locate(info.name) if source is not None else None
        begin = run.old * width + first - run.start * width  # element of the source's tensor
        if source is not None and name is not None and source[name].dtype == info.dtype:
            source.read_into(name, begin * size, into)
            return
        for piece in range(first, stop, PIECE):
            end = min(piece + PIECE, stop)
            if source is not None:
                values = self._values(run.which, info.name, begin + piece - first, end - piece)
            elif run.which == MEAN:
                values = self._mean(info.name, piece, end)
            else:
                values = self._filled(info, piece, end)
            _put(values, info, into[(piece - first) * size : (end - first) * size])

    def _values(self, model: int, name: str, start: int, count: int) -> Tensor:
        """Return (count,) elements of a model's own tensor as they are stored."""
        import torch

        from mergekit_ft.sources.dtypes import TORCH

        source = self._sources[model]
        found = source.locate(name)
        assert found is not None
        dtype = source[found].dtype
        data = bytearray(count * SIZE[dtype])
        source.read_into(found, start * SIZE[dtype], memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[dtype])

    def _mean(self, name: str, first: int, stop: int) -> Tensor:
        """Return the float64 mean of the rows that models have for the token of one row."""
        import torch

        width = self._names[name]
        row, column = divmod(first, width)
        holders = self._alignment.means[row]
        total = torch.zeros(stop - first, dtype=torch.float64)
        for model, old in holders:
            total += self._values(model, name, old * width + column, stop - first)
        return total / len(holders)

    def _filled(self, info: TensorInfo, first: int, stop: int) -> Tensor:
        """Return elements of rows that are the mean of the model's own rows for tokens."""
        import torch

        with self._lock:
            if info.name not in self._fillers:
                self._fillers[info.name] = torch.from_numpy(self._average(info))
        columns = torch.arange(first, stop) % self._names[info.name]
        mean: Tensor = self._fillers[info.name][columns]
        return mean

    def _average(self, info: TensorInfo) -> Any:
        """Return (width,) the float64 mean over all rows that tokens have, in order."""
        import torch

        from mergekit_ft.sources.dtypes import TORCH

        width, size = self._names[info.name], SIZE[info.dtype]
        total = np.zeros(width)
        step = max(1, PIECE // width)
        rows = self._alignment.tokens
        for piece in np.split(rows, range(step, len(rows), step)):
            data = bytearray(len(piece) * width * size)
            for i, row in enumerate(piece.tolist()):
                part = memoryview(data)[i * width * size : (i + 1) * width * size]
                self.read_into(info, row * width * size, part)
            values = torch.frombuffer(data, dtype=TORCH[info.dtype]).double()
            total += values.view(-1, width).numpy().sum(axis=0)
        return total / max(len(rows), 1)


def _put(values: Tensor, info: TensorInfo, into: memoryview) -> None:
    """Write values in a tensor's dtype."""
    import torch

    from mergekit_ft.sources.dtypes import TORCH

    out = torch.frombuffer(into, dtype=TORCH[info.dtype])
    out.copy_(values)
