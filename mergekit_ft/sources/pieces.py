"""Tensors made of runs of another source's bytes: renamed, stacked, or cut out of a stack."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.source import Source


@dataclass(frozen=True, slots=True)
class Run:
    """A run of bytes of a tensor."""

    name: str
    start: int  # byte
    nbytes: int


Runs = tuple[Run, ...]


def whole(info: TensorInfo) -> Runs:
    """Return the run of all of a tensor's bytes."""
    return (Run(info.name, 0, info.nbytes),)


def pieced(
    source: Source,
    made: Iterable[tuple[TensorInfo, Runs]],
    ties: Mapping[str, str],
    notes: Iterable[str] = (),
) -> Source:
    """Return a source of tensors that are runs of another's, one after the other."""
    made = list(made)
    reader = _PieceReader(source, {info.name: runs for info, runs in made})
    found = derived(source, [info for info, _ in made], reader, notes=notes)
    found.ties = dict(ties)
    return found


class _PieceReader:
    """Reads the runs that a range of bytes covers."""

    def __init__(self, source: Source, runs: Mapping[str, Runs]) -> None:
        self._source, self._runs = source, dict(runs)
        self._ends = {
            name: list(accumulate(run.nbytes for run in held)) for name, held in runs.items()
        }
        self.overhead = source.reader.overhead

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        done = 0
        for name, at, nbytes in self._covered(info.name, start, len(into)):
            self._source.read_into(name, at, into[done : done + nbytes])
            done += nbytes

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Pass the advice on."""
        for name, at, count in self._covered(info.name, start, nbytes):
            self._source.will_need(name, at, count)

    def _covered(self, name: str, start: int, nbytes: int) -> Iterable[tuple[str, int, int]]:
        """Yield the source's tensor, first byte and number of bytes of each run in a range."""
        runs, ends = self._runs[name], self._ends[name]
        stop = start + nbytes
        for i in range(bisect_right(ends, start), len(runs)):
            begin = ends[i] - runs[i].nbytes
            if begin >= stop:
                return
            low, high = max(start, begin), min(stop, ends[i])
            yield runs[i].name, runs[i].start + low - begin, high - low

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()
