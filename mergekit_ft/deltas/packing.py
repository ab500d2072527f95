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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.contract import CELL
from mergekit_ft.deltas.writing import DeltaWriter, Record
from mergekit_ft.engine import Result, merge
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.dtypes import FLOATING, SIZE, TORCH
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.patched import tensor_hash

Kind = Literal["emr", "tall"]


@dataclass
class Packed:
    """What a pack holds."""

    out: Path
    scales: dict[str, float]  # by task
    shares: dict[str, float]  # of the entries that each task's mask keeps
    tensors: int
    nbytes: int
    dense: int  # bytes that the tasks' models take beside the base


@dataclass
class _Sums:
    """Sums over the model, of cells in order."""

    own: list[list[float]] = field(default_factory=list)  # by task: of |d_t|
    kept: list[list[float]] = field(default_factory=list)  # by task: of |m_t d|
    bits: list[int] = field(default_factory=list)


def pack(
    base: str,
    tasks: Mapping[str, str],
    out: str | os.PathLike[str],
    *,
    method: Kind = "emr",
    threshold: float = 0.4,
    progress: Progress | None = None,
    **options: Any,
) -> Packed:
    """Write the tuned models `tasks`, by name, as one pack of what they change in `base`."""
    if not tasks:
        raise PlanError("a pack needs at least one TASK=MODEL")
    chosen, watcher = Options(**options), progress or Unwatched()
    opening: dict[str, Any] = {"offline": chosen.offline, "allow_pickle": chosen.allow_pickle}
    sources = [open_source(path, **opening) for path in (base, *tasks.values())]
    try:
        with DeltaWriter(Path(out), overwrite=chosen.overwrite) as writer:
            made = _Packing(sources[0], dict(zip(tasks, sources[1:], strict=True)), writer)
            return made.run(method, threshold, chosen, watcher)
    finally:
        watcher.close()
        for source in sources:
            source.close()


class _Packing:
    """One pack under way."""

    def __init__(self, base: Source, tuned: Mapping[str, Source], writer: DeltaWriter) -> None:
        self.base, self.tuned, self.writer = base, tuned, writer
        count = len(tuned)
        self.sums = _Sums([[] for _ in tuned], [[] for _ in tuned], [0] * count)
        self.records: list[Record] = []

    def run(self, method: Kind, threshold: float, options: Options, watcher: Progress) -> Packed:
        names = list(self._names())
        each = sum(self.base[name].nbytes for name in names)
        watcher.start(each * (1 + len(self.tuned)), f"packing {self.writer.path}")
        width = 8 * (4 + len(self.tuned))  # bytes an element, at most
        size = max(CELL, min(4 * CELL, options.memory // width // CELL * CELL))
        for name in names:
            self._tensor(name, method, threshold, size, watcher)
        if not self.records:
            raise OperatorError(f"nothing changed: every model equals {self.base.reference}")
        return self._commit(method, threshold)

    def _names(self) -> Iterator[str]:
        """Yield the tensors that are packed; what cannot be is told at once."""
        faults = []
        for name, info in self.base.items():
            if self.base.ties.get(name) in self.base:
                continue
            odd = [source for source in self.tuned.values() if not _like(source, name, info)]
            faults += [f"{source.reference}: {name} is not what the base has" for source in odd]
            if info.dtype in FLOATING:
                yield name
            else:
                differ = (
                    [
                        s
                        for s in self.tuned.values()
                        if tensor_hash(s, s.locate(name) or name) != tensor_hash(self.base, name)
                    ]
                    if not odd
                    else []
                )
                faults += [f"{s.reference}: {name} ({info.dtype}) differs" for s in differ]
        for source in self.tuned.values():
            more = [name for name in source if self.base.locate(name) is None]
            if more:
                faults.append(
                    f"{source.reference}: has tensors that the base has not: {listed(more)}"
                )
        if faults:
            raise SourceError("\n".join(faults[:10]) + "\na pack is of models of the base's shape")

    def _tensor(
        self, name: str, method: Kind, threshold: float, size: int, watcher: Progress
    ) -> None:
        info = self.base[name]
        dtype = torch.float64 if info.dtype == "F64" else torch.float32
        changed = False
        for start in range(0, info.numel, size):
            count = min(size, info.numel - start)
            base = _run(self.base, name, start, count).to(dtype)
            deltas = torch.stack(
                [
                    _run(source, source.locate(name) or name, start, count).to(dtype) - base
                    for source in self.tuned.values()
                ]
            )
            self._require_finite(name, deltas)
            changed |= bool(deltas.any())
            unified, masks = _emr(deltas) if method == "emr" else _tall(deltas, threshold)
            stored = unified.to(TORCH[info.dtype])
            self._measure(deltas, stored.to(dtype), masks)
            self.writer.append(name, "unified", stored)
            for task, mask in enumerate(masks):
                packed = np.packbits(mask.numpy(), bitorder="little")
                self.writer.append(name, f"masks {task}", torch.from_numpy(packed))
            watcher.advance(count * SIZE[info.dtype] * (1 + len(deltas)))
        rows = [f"masks {task}" for task in range(len(self.tuned))]
        if not info.numel or not changed:
            self.writer.drop(name, ["unified", *rows])
            return
        self.writer.join(name, "masks", rows)
        shapes = {"masks": (len(rows), (info.numel + 7) // 8)}
        digest = tensor_hash(self.base, name)
        self.records.append(
            Record(name, "mask", info.dtype, info.shape, digest, info.numel, shapes=shapes)
        )

    def _require_finite(self, name: str, deltas: Tensor) -> None:
        for source, delta in zip(self.tuned.values(), deltas, strict=True):
            if not bool(delta.isfinite().all()):
                raise OperatorError(
                    f"{source.reference} or {self.base.reference}: {name} holds NaN or Inf; repair "
                    "the checkpoint"
                )

    def _measure(self, deltas: Tensor, unified: Tensor, masks: Tensor) -> None:
        for task, (delta, mask) in enumerate(zip(deltas, masks, strict=True)):
            self.sums.bits[task] += int(mask.sum())
            for own, kept in zip(
                delta.abs().split(CELL), (unified.abs() * mask).split(CELL), strict=True
            ):
                self.sums.own[task].append(float(own.double().sum()))
                self.sums.kept[task].append(float(kept.double().sum()))

    def _commit(self, method: Kind, threshold: float) -> Packed:
        tasks = list(self.tuned)
        scales = [1.0] * len(tasks)
        if method == "emr":
            pairs = zip(self.sums.own, self.sums.kept, strict=True)
            scales = [_ratio(math.fsum(own), math.fsum(kept)) for own, kept in pairs]
        numel = sum(math.prod(record.shape) for record in self.records)
        words = {
            "base": _identity(self.base),
            "method": method,
            "parameters": {"threshold": threshold} if method == "tall" else {},
            "density": None,
            "seed": None,
            "provenance": {"tuned": {t: _identity(s) for t, s in self.tuned.items()}},
            "tasks": tasks,
            "scales": scales,
        }
        self.writer.commit(words, self.records)
        width = sum(math.prod(r.shape) * SIZE[r.dtype] for r in self.records)
        return Packed(
            self.writer.path,
            dict(zip(tasks, scales, strict=True)),
            {t: bits / numel for t, bits in zip(tasks, self.sums.bits, strict=True)},
            len(self.records),
            self.writer.path.stat().st_size,
            width * len(tasks),
        )


def unpack(
    file: str,
    task: str,
    out: str | os.PathLike[str],
    *,
    base: str,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Write the model of one of a pack's tasks: base + rho_t m_t d, rounded once."""
    entry = {"model": base, "delta": {"path": file, "task": task}}
    plan = {"merge_method": "passthrough", "models": [entry]}
    return merge(plan, out, progress=progress, **options)


def _like(source: Source, name: str, info: Any) -> bool:
    held = source.locate(name)
    return held is not None and source[held].shape == info.shape


def _emr(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) the elected vector and (T, n) the masks."""
    sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0).to(deltas.dtype)
    masks = deltas * sign > 0
    return sign * (deltas.abs() * masks).amax(0), masks


def _tall(deltas: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return (n,) the sum of the task vectors and (T, n) what each needs of it."""
    total = deltas.sum(0)
    return total, deltas.abs() > threshold * (total - deltas).abs()


def _ratio(own: float, kept: float) -> float:
    """Return rho; a task that changes nothing keeps the base."""
    return own / kept if kept else 0.0


def _run(source: Source, name: str, start: int, count: int) -> Tensor:
    width = SIZE[source[name].dtype]
    data = bytearray(count * width)
    source.read_into(name, start * width, memoryview(data))
    return torch.frombuffer(data, dtype=TORCH[source[name].dtype])


def _identity(source: Source) -> dict[str, str | None]:
    return {"id": source.reference, "revision": source.revision}
