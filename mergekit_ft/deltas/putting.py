"""Put a delta on a model, and take it off again, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.engine import Result, merge
from mergekit_ft.errors import SourceError
from mergekit_ft.options import Progress
from mergekit_ft.passes import same_bits
from mergekit_ft.plan import ModelReference
from mergekit_ft.sources import open_source
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import Change, DeltaFile, open_delta
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.patched import HASHED, patched, tensor_hash
from mergekit_ft.sources.source import Source

Where = str | os.PathLike[str]


def apply(
    base: Where,
    delta: Where,
    out: Where,
    *,
    scale: float = 1.0,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Write base + scale * delta to a new folder; a base that the delta is not for is refused."""
    words = {"path": os.fspath(delta), **({} if scale == 1.0 else {"scale": scale})}
    return merge(_plan(base, words), out, progress=progress, **options)


def revert(
    tuned: Where, delta: Where, out: Where, *, progress: Progress | None = None, **options: Any
) -> Result:
    """Write what a model was before a delta was put on it; its bytes must be the base's."""
    offline = bool(options.get("offline"))
    reference = ModelReference.model_validate(os.fspath(tuned))
    with open_source(reference.path, reference.revision, offline=offline) as source:
        require_put_on(source, open_delta(Path(os.fspath(delta)).expanduser(), os.fspath(delta)))
    words = {"path": os.fspath(delta), "revert": True}
    return merge(_plan(tuned, words), out, progress=progress, **options)


def _plan(model: Where, delta: dict[str, Any]) -> dict[str, Any]:
    entry = {"model": os.fspath(model), "delta": delta}
    return {"merge_method": "passthrough", "models": [entry]}


def require_put_on(tuned: Source, delta: DeltaFile) -> None:
    """Refuse a model that does not become the base when the delta is taken off."""
    before = patched(tuned, delta, revert=True)
    wrong = [c for c in delta.changes.values() if not _was_put_on(tuned, before, delta, c)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise SourceError(
            f"{delta.reference}: taken off {tuned.reference}, {wrong[0].name}{more} would not be "
            f"what it was in {delta.base}: the delta was not put on this model, or more was changed"
        )


def _was_put_on(tuned: Source, before: Source, delta: DeltaFile, change: Change) -> bool:
    holds = _holds if change.kind == "dense" else _holds_entries
    if not holds(tuned, delta, change):
        return False
    return change.sha256 is None or tensor_hash(before, change.name) == change.sha256


def _holds_entries(tuned: Source, delta: DeltaFile, change: Change) -> bool:
    """Say whether a tensor has the entries that a change puts there, bit for bit."""
    info, entries = tuned[change.name], Entries(delta, change)
    width = SIZE[info.dtype]
    for start in range(0, info.numel, HASHED // width):
        count = min(HASHED // width, info.numel - start)
        indices, first = entries.within(start, start + count)
        data = bytearray(count * width)
        tuned.read_into(info.name, start * width, memoryview(data))
        here = torch.frombuffer(data, dtype=TORCH[info.dtype])[indices - start]
        if not same_bits(here, entries.values("values", first, len(indices))):
            return False
    return True


def _holds(tuned: Source, delta: DeltaFile, change: Change) -> bool:
    """Say whether a tensor is the one that a dense change puts there."""
    info, held = tuned[change.name], change.parts["values"]
    if (info.dtype, info.shape) != (held.dtype, held.shape):
        return False
    for start in range(0, info.nbytes, HASHED):
        count = min(HASHED, info.nbytes - start)
        one, other = bytearray(count), bytearray(count)
        tuned.read_into(info.name, start, memoryview(one))
        delta.reader.read_into(held, start, memoryview(other))
        if one != other:
            return False
    return True
