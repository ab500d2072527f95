"""Packs: several tuned models as one vector, a bit an entry and a number for each of them.

EMR-Merging (Huang et al. 2024, arXiv:2405.17461): with task vectors d_t,

    sg    = + where the mean of the d_t is above 0, else -
    m_t   = d_t sg > 0
    d     = sg max_t (|d_t| m_t)
    rho_t = sum |d_t| / sum |m_t d|      over all entries of the model
    model of task t = theta_0 + rho_t m_t d

TALL masks (Wang et al. 2024, arXiv:2405.07813, Eq. 5): d = sum_t d_t, m_t = |d_t| > l |d - d_t|
and rho_t = 1. The vector is stored in the base's dtype, and rho_t is of what is stored.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra import unified
from mergekit_ft.algebra.cells import added
from mergekit_ft.blocks import SPARE_ROWS, USUAL, Crew, Job, Piece, Span, Station
from mergekit_ft.contract import CELL
from mergekit_ft.deltas.candidates import spans
from mergekit_ft.deltas.tasks import Asked, Kind, Row, rows_of
from mergekit_ft.deltas.writing import DeltaWriter, Record
from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.passes import finite
from mergekit_ft.resolution.opening import open_model
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.patched import HASHED, tensor_hash

THRESHOLD = 0.4  # of TALL masks; ours, within the paper's 0.2 to 0.6


@dataclass(frozen=True)
class Packed:
    """What a pack holds."""

    out: Path
    scales: dict[str, float]  # by task
    shares: dict[str, float]  # of the entries of these tensors, that each task's mask keeps
    tensors: int
    nbytes: int
    dense: int  # bytes that these tensors take in the tasks' models, in the base's dtypes
    notes: list[str]


@dataclass
class Tally:
    """What was seen of one tensor: sums over cells, and bits, by task."""

    own: list[list[float]]  # of |d_t|
    kept: list[list[float]]  # of |m_t d|
    bits: list[int]

    @classmethod
    def of(cls, tasks: int) -> Tally:
        """Return one of nothing."""
        return cls([[] for _ in range(tasks)], [[] for _ in range(tasks)], [0] * tasks)


def pack(
    base: str,
    tasks: Mapping[str, str],
    out: str | os.PathLike[str],
    *,
    method: Kind = "emr",
    threshold: float | None = None,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Packed:
    """Write the tuned models `tasks`, by name, as one pack of what they change in `base`.

    Neither memory nor threads move a byte. Raises `MergekitError` and leaves no `out` behind.
    """
    if not tasks:
        raise PlanError("a pack needs at least one TASK=MODEL")
    if threshold is not None and method != "tall":
        raise PlanError(f"threshold has no effect with {method}; it is of TALL masks")
    chosen, watcher = Options(**options), progress or Unwatched()
    opening: dict[str, Any] = {"offline": chosen.offline, "allow_pickle": chosen.allow_pickle}
    with ExitStack() as held:
        held.callback(watcher.close)
        first, *others = (
            held.enter_context(open_model(words, **opening)) for words in (base, *tasks.values())
        )
        limit = THRESHOLD if threshold is None else threshold
        asked = Asked(method, limit, tuple(exclude), dict(zip(tasks, others, strict=True)))
        rows = list(rows_of(first, asked))
        writer = held.enter_context(DeltaWriter(Path(out), overwrite=chosen.overwrite))
        return _Packing(first, asked, rows, writer, chosen, watcher).run()


class _Packing:
    """One pack under way."""

    def __init__(
        self,
        base: Source,
        asked: Asked,
        rows: Sequence[Row],
        writer: DeltaWriter,
        options: Options,
        watcher: Progress,
    ) -> None:
        self.base, self.asked, self.rows, self.writer = base, asked, rows, writer
        self.options, self.watcher = options, watcher
        self.tasks = list(asked.tuned)
        self.tallies: dict[str, Tally] = {}  # by tensor
        self.records: list[Record] = []
        self._lock = threading.Lock()

    def run(self) -> Packed:
        """Make every tensor's vector and masks, and write the file."""
        size = self._size()
        moved = sum(ref.info.nbytes for row in self.rows for ref in (row.base, *row.tuned))
        self.watcher.start(moved, f"packing {self.writer.path}")
        crew = Crew(self.options.workers, torch.device("cpu"))
        crew.run(self._job(row, size) for row in self.rows)
        if not self.records:
            raise OperatorError(f"nothing changed: every model equals {self.base.reference}")
        return self._commit()

    def _size(self) -> int:
        """Return the elements of a block: whole cells, so that all workers stay in the budget."""
        threads, memory = self.options.workers, self.options.memory
        width = max((row.dtype.itemsize for row in self.rows), default=4)
        cell = (1 + len(self.tasks) + unified.ROWS + SPARE_ROWS) * width * CELL
        cell += len(self.tasks) * CELL // 8
        sources = (self.base, *self.asked.tuned.values())
        beside = HASHED + max(source.reader.overhead for source in sources)
        if threads * (cell + beside) > memory:
            raise OperatorError(
                f"{threads} threads over {len(self.tasks)} models need at least "
                f"{threads * (cell + beside):,} bytes of memory, more than the {memory:,} given; "
                "raise --memory or lower --threads"
            )
        return min(USUAL, (memory // threads - beside) // cell * CELL)

    # ---- one tensor

    def _job(self, row: Row, size: int) -> Job:
        """Make one tensor's vector and masks, block by block, and hash the base's."""
        tally, digest = Tally.of(len(self.tasks)), list[str]()
        blocks = list(spans(row.base.info.numel, size))

        def hashing(station: Station) -> None:
            digest.append(tensor_hash(self.base, row.base.name))

        yield [*(self._piece(row, i, span, tally) for i, span in enumerate(blocks)), hashing]
        with self._lock:
            self._settle(row, len(blocks), tally, digest[0])

    def _piece(self, row: Row, number: int, span: Span, tally: Tally) -> Piece:
        def make(station: Station) -> None:
            deltas, scratch = self._deltas(row, span, station)
            own = [added(torch.abs(delta, out=scratch[0])).tolist() for delta in deltas]
            vector = self._unified(deltas, scratch)
            stored = station.stage(2, span.n, TORCH[row.base.info.dtype]).copy_(vector)
            self._require_fits(row, stored)
            sizes = scratch[0].copy_(stored).abs_()
            kept = [added(torch.mul(sizes, m, out=scratch[1])).tolist() for m in deltas]
            masks = [_bits(mask) for mask in deltas]
            with self._lock:
                self._append(row, number, stored, [bits for bits, _ in masks])
                for task, (_, ones) in enumerate(masks):
                    tally.own[task] += own[task]
                    tally.kept[task] += kept[task]
                    tally.bits[task] += ones

        return make

    def _deltas(self, row: Row, span: Span, station: Station) -> tuple[Tensor, Tensor]:
        """Return (T, n) the task vectors, and the rows of scratch."""
        frame = station.frame(len(self.tasks), unified.ROWS, span.n, row.dtype)
        frame.base.copy_(station.read(row.base, span, 0))
        for delta, ref in zip(frame.models, row.tuned, strict=True):
            delta.copy_(station.read(ref, span, 1)).sub_(frame.base)
            if not finite(delta):
                raise OperatorError(
                    f"{ref.source.reference} or {self.base.reference}: {row.pair.name} holds NaN "
                    "or Inf; repair the checkpoint"
                )
            self.watcher.advance(span.n * SIZE[ref.info.dtype])
        self.watcher.advance(span.n * SIZE[row.base.info.dtype])
        return frame.tuned, frame.scratch

    def _unified(self, deltas: Tensor, scratch: Tensor) -> Tensor:
        """Return (n,) the vector; the task vectors become their masks."""
        if self.asked.method == "emr":
            return unified.elected(deltas, scratch)
        return unified.needed(deltas, [self.asked.threshold] * len(deltas), scratch)

    def _require_fits(self, row: Row, stored: Tensor) -> None:
        if not finite(stored):
            raise OperatorError(
                f"{row.pair.name}: what its tasks change is too large for {row.base.info.dtype}"
            )

    def _append(self, row: Row, number: int, stored: Tensor, masks: Sequence[Tensor]) -> None:
        """Spool one block's parts; they are put in order when the tensor is whole."""
        for name in row.names:
            self.writer.append(name, f"unified {number}", stored)
            for task, bits in enumerate(masks):
                self.writer.append(name, f"masks {task} {number}", bits)

    def _settle(self, row: Row, blocks: int, tally: Tally, digest: str) -> None:
        """Make each part of a tensor one, or leave the tensor out where nothing changed."""
        vector = [f"unified {i}" for i in range(blocks)]
        masks = [f"masks {task} {i}" for task in range(len(self.tasks)) for i in range(blocks)]
        info = row.base.info
        shapes = {"masks": (len(self.tasks), (info.numel + 7) // 8)}
        changed = any(any(cells) for cells in tally.own)
        for name in row.names:
            if not changed:
                self.writer.drop(name, [*vector, *masks])
                continue
            self.writer.join(name, "unified", vector)
            self.writer.join(name, "masks", masks)
            known = (name, "mask", info.dtype, info.shape, digest, info.numel)
            self.records.append(Record(*known, shapes=shapes))
        if changed:
            self.tallies[row.pair.name] = _added_up(tally)

    # ---- the file

    def _commit(self) -> Packed:
        scales = dict(zip(self.tasks, self._scales(), strict=True))
        words = {
            "base": _identity(self.base),
            "method": self.asked.method,
            "parameters": self._parameters(),
            "density": None,
            "seed": None,
            "provenance": {"tuned": {t: _identity(s) for t, s in self.asked.tuned.items()}},
            "tasks": self.tasks,
            "scales": list(scales.values()),
        }
        self.writer.commit(words, self.records)
        infos = [self.base[name] for name in self.tallies]
        numel = sum(info.numel for info in infos)
        bits = [sum(t.bits[i] for t in self.tallies.values()) for i in range(len(self.tasks))]
        return Packed(
            out=self.writer.path,
            scales=scales,
            shares={task: held / numel for task, held in zip(self.tasks, bits, strict=True)},
            tensors=len(self.records),
            nbytes=self.writer.path.stat().st_size,
            dense=len(self.tasks) * sum(info.nbytes for info in infos),
            notes=[note for s in (self.base, *self.asked.tuned.values()) for note in s.notes],
        )

    def _parameters(self) -> dict[str, Any]:
        """Return what the file says of how it was made."""
        exclude = {"exclude": list(self.asked.exclude)} if self.asked.exclude else {}
        return exclude | (
            {"threshold": self.asked.threshold} if self.asked.method == "tall" else {}
        )

    def _scales(self) -> Iterator[float]:
        """Yield rho of each task; one that changes nothing keeps the base."""
        tallies = [self.tallies[key] for key in sorted(self.tallies)]
        for task, name in enumerate(self.tasks):
            own = math.fsum(cell for tally in tallies for cell in tally.own[task])
            kept = math.fsum(cell for tally in tallies for cell in tally.kept[task])
            if own and not kept:
                raise OperatorError(
                    f"{name}: nothing of what it changes is in the vector, so that its model would "
                    "be the base; leave it out, or pack it alone"
                )
            scale = 1.0 if self.asked.method == "tall" else own / kept if kept else 0.0
            if not math.isfinite(scale):
                raise OperatorError(f"{name}: its scale is {scale}: its changes are too large")
            yield scale


def _bits(mask: Tensor) -> tuple[Tensor, int]:
    """Return (n / 8,) bytes of ones and zeros, the lowest bit first, and how many are ones."""
    ones = mask.to(torch.bool).numpy()
    return torch.from_numpy(np.packbits(ones, bitorder="little")), int(np.count_nonzero(ones))


def _added_up(tally: Tally) -> Tally:
    """Return sums over the tensor instead of its cells; both are exactly rounded."""
    own = [[math.fsum(cells)] for cells in tally.own]
    return Tally(own, [[math.fsum(cells)] for cells in tally.kept], tally.bits)


def _identity(source: Source) -> dict[str, str | None]:
    return {"id": source.reference, "revision": source.revision}
