"""One task of a pack again: its model on the base, or its change as a delta of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.indices import coded, gaps
from mergekit_ft.deltas.writing import DeltaWriter, Record, coding
from mergekit_ft.engine import Result, merge
from mergekit_ft.errors import OperatorError
from mergekit_ft.options import Progress
from mergekit_ft.sources.delta_file import Change, DeltaFile, open_delta
from mergekit_ft.sources.masked import Mask
from mergekit_ft.sources.patched import require_task

RUN = 1 << 18  # entries at a time


@dataclass(frozen=True)
class Unpacked:
    """What a delta of one task holds."""

    out: Path
    entries: int
    tensors: int
    nbytes: int


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


def unpack_delta(
    file: str, task: str, out: str | os.PathLike[str], *, overwrite: bool = False
) -> Unpacked:
    """Write what one of a pack's tasks adds as a delta; put on, it gives the task's model.

    Values are rho_t d: in float32 (float64 where d is), as it is stored where rho_t is 1.
    """
    pack = open_delta(Path(file).expanduser(), file)
    try:
        require_task(pack, task, file)
        with DeltaWriter(Path(out), overwrite=overwrite) as writer:
            records = [r for c in pack.changes.values() if (r := _write(pack, c, task, writer))]
            if not records:
                raise OperatorError(f"{file}: task {task} changes nothing")
            writer.commit(_words(pack, task), records)
            entries = sum(record.entries for record in records)
            return Unpacked(Path(out), entries, len(records), Path(out).stat().st_size)
    finally:
        pack.close()


def _words(pack: DeltaFile, task: str) -> dict[str, Any]:
    words = {key: pack.words[key] for key in ("base", "seed")}
    provenance = {"pack": pack.reference, "method": pack.words["method"], "task": task}
    tuned = pack.words["provenance"].get("tuned")
    if isinstance(tuned, dict) and task in tuned:
        provenance["tuned"] = tuned[task]
    scale = pack.words["scales"][pack.tasks.index(task)]
    return {
        **words,
        "method": "unpack",
        "parameters": {"task": task, "scale": scale},
        "density": None,
        "provenance": provenance,
    }


def _write(pack: DeltaFile, change: Change, task: str, writer: DeltaWriter) -> Record | None:
    """Write one tensor's entries, once it is known how their places are best coded."""
    if change.kind != "mask":
        raise OperatorError(
            f"{pack.reference}: {change.name} is of kind {change.kind}, the same for every task"
        )
    entries, codes, before = 0, 0, -1
    for indices, _ in _runs(pack, change, task):
        codes += coded(indices, before)
        before = int(indices[-1])
        entries += len(indices)
    if not entries:
        return None
    code, before = coding(change.numel, codes, entries), -1
    for indices, values in _runs(pack, change, task):
        index = gaps(indices, before) if code == "gap16" else indices
        writer.append(change.name, "indices", index.int() if code == "int32" else index)
        writer.append(change.name, "values", values)
        before = int(indices[-1])
    known = (change.name, "add", change.dtype, change.shape, change.sha256)
    return Record(*known, entries, code)


def _runs(pack: DeltaFile, change: Change, task: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the places and values of what a task adds, where that is anything."""
    mask = Mask(pack, change, task)
    wide = change.parts["unified"].dtype == "F64" or change.dtype == "F64"
    for start in range(0, change.numel, RUN):
        count = min(RUN, change.numel - start)
        stored = mask.unified(start, count)
        places = mask.bits(start, count).bool().logical_and_(stored != 0).nonzero().flatten()
        if len(places):
            values = stored[places]
            if mask.scale != 1.0:
                values = values.to(torch.float64 if wide else torch.float32).mul_(mask.scale)
            yield places + start, values
