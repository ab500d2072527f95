"""What a delta file is, for people: what it changes, how much, of what, and what it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.inspection.tables import size
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import Change, DeltaFile, open_delta
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.masked import Mask

RUN = 1 << 18  # entries at a time
LONG = 200  # characters of what is told only under --json: a plan, curves


def info(path: str) -> dict[str, Any]:
    """Return what a delta file holds; its values are read once, a run at a time."""
    delta = open_delta(Path(path).expanduser(), path)
    try:
        tensors = [_tensor(delta, change) for change in delta.changes.values()]
        shares = _shares(delta)
    finally:
        delta.close()
    numel = sum(change.numel for change in delta.changes.values())
    dense = sum(change.numel * SIZE[change.dtype] for change in delta.changes.values())
    dense *= max(1, len(delta.tasks))  # each task of a pack has a model
    entries = sum(change.entries for change in delta.changes.values())
    words = delta.words
    return {
        "path": path,
        "base": words["base"],
        "method": words["method"],
        "parameters": words["parameters"],
        "density": words["density"],
        "seed": words["seed"],
        "provenance": words["provenance"],
        "tasks": dict(zip(delta.tasks, words.get("scales", ()), strict=True)),
        "shares": shares,
        "kinds": _counts(change.kind for change in delta.changes.values()),
        "tensors": tensors,
        "entries": entries,
        "share": entries / numel if numel else 0.0,
        "bytes": delta.file.size,
        "dense_bytes": dense,
        "norm": math.sqrt(sum(tensor["norm"] ** 2 for tensor in tensors if tensor["norm"])),
        "exact": all(change.exact for change in delta.changes.values()),
    }


def _counts(words: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return dict(sorted(found.items()))


def _tensor(delta: DeltaFile, change: Change) -> dict[str, Any]:
    return {
        "name": change.name,
        "kind": change.kind,
        "dtype": change.dtype,
        "shape": list(change.shape),
        "entries": change.entries,
        "share": change.entries / change.numel if change.numel else 0.0,
        "coding": change.coding,
        "sha256": change.sha256,
        "norm": _norm(delta, change),
    }


def _shares(delta: DeltaFile) -> dict[str, float]:
    """Return, by task of a pack, the share of the entries that its masks keep."""
    packed = [change for change in delta.changes.values() if change.kind == "mask"]
    numel = sum(change.numel for change in packed)
    found = {}
    for task in delta.tasks:
        masks = [(Mask(delta, change, task), change.numel) for change in packed]
        ones = sum(_ones(mask, held) for mask, held in masks)
        found[task] = ones / numel if numel else 0.0
    return found


def _ones(mask: Mask, numel: int) -> int:
    runs = ((start, min(RUN, numel - start)) for start in range(0, numel, RUN))
    return sum(int(torch.count_nonzero(mask.bits(*run))) for run in runs)


def _norm(delta: DeltaFile, change: Change) -> float | None:
    """Return the L2 norm of what is added; None where the file alone does not tell it."""
    if change.coding is not None:
        entries = Entries(delta, change)
        entries.within(0, 1)  # so that indices which cannot be are told
    if change.kind == "low_rank":
        a, b = (_whole(delta, change, part) for part in ("a", "b"))
        gram = (b.T @ b) * (a @ a.T)  # |b a|^2 = sum of (b^T b) . (a a^T)
        return float(gram.sum().clamp(min=0).sqrt()) * abs(change.scale)
    if change.kind == "mask" or (change.kind == "dense" and not change.exact):
        return None
    values, originals = change.parts["values"], change.parts.get("originals")
    if originals is not None and originals.shape != values.shape:
        return None
    total = 0.0
    for start in range(0, values.numel, RUN):
        count = min(RUN, values.numel - start)
        moved = _run(delta, change, "values", start, count)
        if originals is not None:
            moved = moved - _run(delta, change, "originals", start, count)
        total += float(moved.square().sum())
    return math.sqrt(total)


def _run(delta: DeltaFile, change: Change, part: str, start: int, count: int) -> torch.Tensor:
    held = change.parts[part]
    data = bytearray(count * SIZE[held.dtype])
    delta.reader.read_into(held, start * SIZE[held.dtype], memoryview(data))
    return torch.frombuffer(data, dtype=TORCH[held.dtype]).double()


def _whole(delta: DeltaFile, change: Change, part: str) -> torch.Tensor:
    held = change.parts[part]
    return _run(delta, change, part, 0, held.numel).view(held.shape)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    base = report["base"]
    at = f"@{base['revision']}" if base.get("revision") else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["kinds"].items())
    yield f"{report['path']}: {report['method']} of {base.get('id')}{at}"
    yield f"{len(report['tensors'])} tensors: {kinds}"
    yield f"{report['entries']:,} entries, {report['share']:.4%} of these tensors"
    times = report["dense_bytes"] / report["bytes"]
    whole = size(report["dense_bytes"])
    what = "the tasks' own tensors" if report["tasks"] else "these tensors whole"
    yield f"{size(report['bytes'])}; {what} take {whole}, {times:.2f} x as much"
    if report["norm"]:
        yield f"norm of what is added: {report['norm']:.6g}"
    for task, scale in report["tasks"].items():
        yield f"task {task}: scale {scale:.6g}, {report['shares'][task]:.1%} kept"
    yield "can be taken off exactly" if report["exact"] else "cannot be taken off exactly"
    for key, value in {**report["parameters"], **report["provenance"]}.items():
        if value not in (None, [], {}, "") and len(str(value)) < LONG:
            yield f"{key.replace('_', ' ')}: {value}"
    yield ""
    width = max(len(tensor["name"]) for tensor in report["tensors"])
    for tensor in report["tensors"]:
        norm = "" if tensor["norm"] is None else f"  norm {tensor['norm']:.4g}"
        yield (
            f"{tensor['name'].ljust(width)}  {tensor['kind']:8}  {tensor['entries']:>12,}  "
            f"{tensor['share']:9.4%}{norm}"
        )
