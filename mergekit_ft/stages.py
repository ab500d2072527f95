"""A merge as a source: the values of a stage, made from its own sources as they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from mergekit_ft.blocks import (
    SPARE_ROWS,
    Crew,
    Job,
    Span,
    Station,
    least_bytes,
    longest,
    view_of,
    whole,
)
from mergekit_ft.contract import CELL, Finding
from mergekit_ft.passes import Passes
from mergekit_ft.plan import Reading
from mergekit_ft.resolution import Resolution, Task
from mergekit_ft.resolution import resolve as resolve_with
from mergekit_ft.sources import Source
from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.dtypes import SIZE
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import TensorInfo

SPARE = 4 << 20  # bytes that a survey of a stage may keep
CPU = torch.device("cpu")


def resolve(reading: Reading, **opening: Any) -> Resolution:
    """Open a plan's sources, its stages among them, and find every tensor its words mean."""
    return resolve_with(reading, source_of, **opening)


def source_of(name: str, resolution: Resolution) -> Source:
    """Return a stage's merge as a source, with the surroundings of its donor."""
    reader, leaves = StageReader(resolution), resolution.leaves
    inputs = {f"{leaf}: {file}": held for leaf in leaves for file, held in leaf.inputs.items()}
    return derived(
        resolution.donor,
        reader.infos(),
        reader,
        reference=name,
        inputs=inputs,
        edits=resolution.edits,
        origins=leaves,
    )


class StageReader(Reader):
    """Computes ranges of merged tensors, cell by cell, on the thread that asks.

    What a survey finds is kept. Values are those of the arithmetic, unrounded.
    """

    def __init__(self, resolution: Resolution) -> None:
        tasks = list(map(_unrounded, resolution.tasks))
        self._resolution = resolution
        self._tasks = {task.name: task for task in tasks}
        self._mine = threading.local()
        crew = _Alone(self._station)
        self._passes = Passes(tasks, CELL, crew, allow_non_finite=True, spare=SPARE)
        self._findings: dict[str, Finding] = {}
        self._locks: dict[str, threading.Lock] = {task.name: threading.Lock() for task in tasks}
        self._over_model = threading.Lock()
        self._surveyed = False
        self._whole: tuple[str, bytes] = ("", b"")  # the last tensor that had to be made at once
        self._making_whole = threading.Lock()
        self.overhead = SPARE + max(map(_bytes, tasks), default=0)
        self.overhead += sum(source.reader.overhead for source in resolution.sources)

    def infos(self) -> list[TensorInfo]:
        """Return what is known of each tensor: computed in one dtype, kept in another."""
        rounded = {task.name: task.dtype for task in self._resolution.tasks}
        first = self._resolution.donor.files[0].name  # for tensors that the donor has not
        files = {info.name: info.file for info in self._resolution.donor.values()}
        return [
            TensorInfo(
                name,
                task.dtype,
                task.shape,
                files.get(name, first),
                0,
                task.nbytes,
                stored=rounded[name],
            )
            for name, task in self._tasks.items()
        ]

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        task = self._tasks[info.name]
        if _at_once(task):
            into[:] = memoryview(self._made_whole(task))[start : start + len(into)]
            return
        width, step = SIZE[task.dtype], CELL if task.copy is not None else longest(task, CELL)
        stop = start + len(into)
        for at in range(start // width // step * step, -(-stop // width), step):
            span = Span(at, min(at + step, task.numel))
            low, high = max(start, span.start * width), min(stop, span.stop * width)
            made = view_of(self._values(task, span))
            into[low - start : high - start] = made[low - at * width : high - at * width]

    def _values(self, task: Task, span: Span) -> torch.Tensor:
        return self._passes.values(task, span, self._station(), self._finding(task))

    def _made_whole(self, task: Task) -> bytes:
        """Return all bytes of a tensor that an operator must see at once."""
        with self._making_whole:
            if self._whole[0] != task.name:
                self._whole = ("", b"")
                made = self._values(task, Span(0, task.numel))
                self._whole = (task.name, bytes(view_of(made)))
                self._mine.station = Station(CPU)  # its buffers were as large as the tensor
            return self._whole[1]

    def _finding(self, task: Task) -> Finding:
        if task.copy is not None:
            return None
        with self._locks[task.name]:
            if task.name not in self._findings:
                self._survey_model()
                self._findings[task.name] = self._passes.finding(task)
            return self._findings[task.name]

    def _survey_model(self) -> None:
        with self._over_model:
            if not self._surveyed:
                self._passes.survey_model(lambda key, finding: finding)
                self._surveyed = True

    def _station(self) -> Station:
        """Return the buffers of the thread that asks."""
        if not hasattr(self._mine, "station"):
            self._mine.station = Station(CPU)
        station: Station = self._mine.station
        return station

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Do nothing: the stage's own sources are told when its blocks are read."""

    def close(self) -> None:
        """Let go of the stage's sources."""
        self._resolution.close()


class _Alone(Crew):
    """A crew of whichever thread asks."""

    def __init__(self, station: Any) -> None:
        super().__init__(1, CPU)
        self._station_of = station

    def run(self, jobs: Iterable[Job]) -> None:
        """Carry out every job, one after the other."""
        for job in jobs:
            for pieces in job:
                for piece in pieces:
                    piece(self._station_of())


def _unrounded(task: Task) -> Task:
    """Return a task whose output is what the arithmetic gives, or what is copied."""
    if task.copy is not None:
        return replace(task, dtype=task.copy.info.dtype)
    return replace(task, dtype="F64" if task.bits == 64 else "F32")


def _bytes(task: Task) -> int:
    """Return the bytes that a worker may take for a range of a task's tensor."""
    if task.copy is not None:
        return SPARE_ROWS * CELL * SIZE[task.dtype]
    return least_bytes(task) + (task.nbytes if whole(task) else 0)


def _at_once(task: Task) -> bool:
    return task.copy is None and whole(task)
