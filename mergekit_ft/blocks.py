"""Blocks: the same elements of a tensor from every source, cut to a budget; and the crew."""

from __future__ import annotations

import ctypes
import heapq
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_ft.contract import CELL, RUN, Block, Grain
from mergekit_ft.errors import OperatorError
from mergekit_ft.resolution import Ref, Task
from mergekit_ft.sources.dtypes import SIZE, TORCH

USUAL = 4 * CELL  # elements of a block where the budget allows: it stays in the cache
SPARE_ROWS = 10  # float32 rows a worker needs besides its block: staging, output, indices
AHEAD = 8  # blocks that the system is told of before they are read


@dataclass(frozen=True, slots=True)
class Span:
    """A run of elements of a tensor."""

    start: int
    stop: int

    @property
    def n(self) -> int:
        """Return how many elements it holds."""
        return self.stop - self.start


def block_bytes(task: Task, n: int) -> int:
    """Return the memory that one worker needs for blocks of n elements of this task."""
    padded = -(-n // 64) * 64
    return (1 + len(task.tuned) + task.scratch + SPARE_ROWS) * padded * task.bits // 8


def whole(task: Task) -> bool:
    """Say whether the task's operators must see the tensor at once."""
    return any(op.grain is Grain.TENSOR for op in (task.operator, *task.then) if op is not None)


def least_bytes(task: Task) -> int:
    """Return the memory that one worker needs for this task: a cell, or all of it if it must."""
    return block_bytes(task, longest(task, 0))


def longest(task: Task, size: int) -> int:
    """Return the elements of the largest block of a task: whole cells, at least one."""
    if whole(task):
        return task.numel
    return min(task.numel, max(1, size // task.cell) * task.cell)


def block_size(tasks: Sequence[Task], memory: int, threads: int) -> int:
    """Return the elements of a block, whole cells, so that all workers stay within the budget."""
    if not tasks:
        return USUAL
    hungriest = max(tasks, key=least_bytes)
    need = threads * least_bytes(hungriest)
    if need > memory:
        raise OperatorError(
            f"{hungriest.name}: {threads} threads over {len(hungriest.tuned)} models need at "
            f"least {need:,} bytes of memory, more than the {memory:,} given; raise --memory or "
            "lower --threads"
        )
    widest = max(block_bytes(task, CELL) for task in tasks)
    return min(USUAL, max(1, memory // (threads * widest)) * CELL)


def cut(task: Task, size: int, every: int = 1) -> Iterator[Span]:
    """Yield the spans that a task's tensor is cut into; of a sample, each `every`-th short run."""
    step = longest(task, size)
    if every > 1 and not whole(task):
        step = min(step, RUN if task.cell == CELL else task.cell)
    for start in range(0, task.numel, max(step, 1) * every):
        yield Span(start, min(start + step, task.numel))


class Frame(NamedTuple):
    """A worker's rows of arithmetic for blocks of one size, as views that are made once."""

    base: Tensor  # (n,)
    models: tuple[Tensor, ...]  # k of (n,), the rows of `tuned`
    tuned: Tensor  # (k, n)
    scratch: Tensor  # (s, n)
    nothing: Tensor  # (0,) in place of a base


class Station:
    """One worker's buffers, refilled for every block; on a GPU, its staging and its stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._arena = torch.empty(0, dtype=torch.uint8, device=device)
        self._staging = [torch.empty(0, dtype=torch.uint8) for _ in range(3)]
        self._frames: dict[tuple[int, int, int, torch.dtype], Frame] = {}
        self._stages: dict[tuple[int, int, torch.dtype], Tensor] = {}
        cuda: Any = torch.cuda  # whose streams are not typed
        self.stream = cuda.Stream(device) if device.type == "cuda" else None

    def frame(self, k: int, scratch: int, n: int, dtype: torch.dtype) -> Frame:
        """Return uninitialised arithmetic memory for blocks of k models and n elements."""
        key = (k, scratch, n, dtype)
        if key not in self._frames:
            self._frames[key] = _frame(self._carve(1 + k + scratch, n, dtype), k)
        return self._frames[key]

    def _carve(self, rows: int, n: int, dtype: torch.dtype) -> Tensor:
        """Return (rows, n) of the arena; where it grows, earlier frames are forgotten."""
        padded = -(-n // 64) * 64
        need = rows * padded * dtype.itemsize
        if self._arena.numel() < need:
            self._frames.clear()
            self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
            self._arena = torch.empty(need, dtype=torch.uint8, device=self.device)
        return self._arena[:need].view(dtype).view(rows, padded)[:, :n]

    def stage(self, which: int, n: int, dtype: torch.dtype) -> Tensor:
        """Return (n,) of host memory, pinned where the device is a GPU: 0 base, 1 tuned, 2 out."""
        key = (which, n, dtype)
        if key not in self._stages:
            self._stages[key] = self._staged(which, n * dtype.itemsize).view(dtype)
        return self._stages[key]

    def _staged(self, which: int, need: int) -> Tensor:
        if self._staging[which].numel() < need:
            pinned = self.device.type == "cuda"
            self._stages = {key: view for key, view in self._stages.items() if key[0] != which}
            self._staging[which] = torch.empty(0, dtype=torch.uint8)
            self._staging[which] = torch.empty(need, dtype=torch.uint8, pin_memory=pinned)
        return self._staging[which][:need]

    def read(self, ref: Ref, span: Span, which: int) -> Tensor:
        """Return (n,) the span as stored, in host memory."""
        dtype = TORCH[ref.info.dtype]
        raw = self.stage(which, span.n, dtype)
        ref.source.read_into(ref.name, span.start * dtype.itemsize, view_of(raw))
        return raw

    def settle(self) -> None:
        """Wait until what was queued on the device has happened."""
        if self.stream is not None:
            self.stream.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


def view_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous host tensor, shared."""
    return _bytes_at(tensor.data_ptr(), tensor.nbytes)


@lru_cache(maxsize=64)
def _bytes_at(address: int, nbytes: int) -> memoryview:
    array = (ctypes.c_char * nbytes).from_address(address) if nbytes else b""
    return memoryview(array).cast("B")


def load(station: Station, task: Task, span: Span) -> Block:
    """Read one block of a task from every source."""
    dtype = torch.float64 if task.bits == 64 else torch.float32
    frame = station.frame(len(task.tuned), task.scratch, span.n, dtype)
    if task.base is not None:
        _fill(station, frame.base, task.base, span, 0)
    for row, ref in zip(frame.models, task.tuned, strict=True):
        _fill(station, row, ref, span, 1)
    return Block(
        name=task.known,
        shape=task.shape,
        start=span.start,
        base=frame.base if task.base is not None else frame.nothing,
        tuned=frame.tuned,
        ids=task.ids,
        place=task.place,
        first_cell=task.first_cell + span.start // task.cell,
        scratch=frame.scratch,
        cell=task.cell,
    )


def _frame(rows: Tensor, k: int) -> Frame:
    """Return (1 + k + s, n) rows as the parts of a block."""
    tuned = rows[1 : k + 1]
    return Frame(rows[0], tuned.unbind(), tuned, rows[k + 1 :], rows[0, :0])


def _fill(station: Station, row: Tensor, ref: Ref, span: Span, which: int) -> None:
    """Read a span of one source into a row of arithmetic."""
    if span.start % (AHEAD * span.n) == 0:
        ref.source.will_need(ref.name, *_ahead(ref, span))
    raw = station.read(ref, span, which)
    if station.stream is None:
        row.copy_(raw)
        return
    row.copy_(raw, non_blocking=True)
    if which:
        station.settle()  # the staging buffer is read into again


def _ahead(ref: Ref, span: Span) -> tuple[int, int]:
    """Return the bytes, from and count, of the blocks after the next few."""
    step = AHEAD * span.n * SIZE[ref.info.dtype]
    start = min(span.start * SIZE[ref.info.dtype] + step, ref.info.nbytes)
    return start, min(step, ref.info.nbytes - start)


Piece = Callable[[Station], None]
Job = Generator[list[Piece], None, None]  # yields what may run side by side, resumed when all ran


class Crew:
    """Threads that take the earliest piece that is ready; the first error stops them all."""

    def __init__(self, threads: int, device: torch.device) -> None:
        self.threads, self.device = threads, device

    def run(self, jobs: Iterable[Job]) -> None:
        """Carry out every job; a job starts only when no piece of an earlier one is ready."""
        shift = _Shift(iter(jobs), self.device)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        workers = [
            threading.Thread(target=shift.work, name=f"merge-{i}", daemon=True)
            for i in range(self.threads)
        ]
        try:
            with _hearing(shift.stop):
                for worker in workers:
                    worker.start()
                for worker in workers:
                    while worker.is_alive():
                        worker.join(0.2)  # so that Ctrl-C is heard
        except BaseException as error:
            shift.stop(error)
            raise
        finally:
            for worker in filter(threading.Thread.is_alive, workers):  # Ctrl-C can come between
                worker.join()
            torch.set_num_threads(before)
        if shift.error is not None:
            raise shift.error


@contextmanager
def _hearing(stop: Callable[[BaseException], None]) -> Iterator[None]:
    """Let Ctrl-C stop the work instead of being raised wherever the main thread stands.

    Raised while a thread's start or end is awaited, it would leave the thread running unseen.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: stop(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Shift:
    """The state that the workers of one run share."""

    def __init__(self, jobs: Iterator[Job], device: torch.device) -> None:
        self.jobs, self.device = jobs, device
        self.turn = threading.Condition()
        self.ready: list[tuple[int, int, Piece]] = []
        self.open: dict[int, tuple[Job, int]] = {}  # jobs under way, and pieces they wait for
        self.started = 0
        self.error: BaseException | None = None

    def work(self) -> None:
        """Take pieces until nothing is left."""
        torch.set_num_threads(1)
        try:
            station = Station(self.device)
            while (taken := self._take()) is not None:
                number, piece = taken
                if piece is not None:
                    self._carry_out(piece, station)
                if piece is None or self._was_last(number):
                    self._advance(number)
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Remember the first error and let every worker go home."""
        with self.turn:
            self.error = self.error or error
            self.turn.notify_all()

    def _carry_out(self, piece: Piece, station: Station) -> None:
        if station.stream is None:
            piece(station)
        else:
            with torch.cuda.stream(station.stream):
                piece(station)

    def _take(self) -> tuple[int, Piece | None] | None:
        """Return the earliest piece with its job's number; a number alone is a job to begin."""
        with self.turn:
            while self.error is None:
                if self.ready:
                    number, _, piece = heapq.heappop(self.ready)
                    return number, piece
                if (job := next(self.jobs, None)) is not None:
                    self.started += 1
                    self.open[self.started] = (job, 0)
                    return self.started, None
                if not self.open:
                    return None
                self.turn.wait()
            return None

    def _was_last(self, number: int) -> bool:
        """Say whether a job's pieces have all been carried out."""
        with self.turn:
            job, left = self.open[number]
            self.open[number] = (job, left - 1)
            return left == 1

    def _advance(self, number: int) -> None:
        """Let a job go on, while the others work, and queue its next pieces, or close it."""
        job, _ = self.open[number]
        pieces = next((pieces for pieces in job if pieces), None)
        with self.turn:
            if pieces is None:
                del self.open[number]
            else:
                self.open[number] = (job, len(pieces))
                for order, piece in enumerate(pieces):
                    heapq.heappush(self.ready, (number, order, piece))
            self.turn.notify_all()
