"""What a delta of another tool's says, brought to the names and the order of a base's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.indices import coded, gaps
from mergekit_ft.deltas.writing import DeltaWriter, Record, coding
from mergekit_ft.errors import SourceError
from mergekit_ft.registry import nearest
from mergekit_ft.sources import Source
from mergekit_ft.sources.adapted import rules
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import Change, DeltaFile
from mergekit_ft.sources.dtypes import CODE, TORCH
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.patched import tensor_hash


@dataclass(frozen=True)
class Sparse:
    """What changes of one tensor: entries at flat row-major indices, increasing."""

    indices: Tensor  # (n,) int64
    values: Tensor  # (n,) what is added, or what stands there


@dataclass
class Foreign:
    """A delta of another tool, in memory."""

    reference: str
    added: dict[str, Sparse] = field(default_factory=dict)
    replaced: dict[str, Sparse] = field(default_factory=dict)  # values stand there
    whole: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What was written."""

    out: Path
    tensors: int
    entries: int
    notes: tuple[str, ...] = ()


def placed(foreign: Foreign, base: Source) -> Foreign:
    """Return a delta under the base's names: as they are, or by one stem; all must be there."""
    names = [*foreign.added, *foreign.replaced]
    best: list[str] = names
    for rule in rules():
        missing = [name for name in names if base.locate(rule(name)) is None]
        if not missing:
            break
        best = min(best, missing, key=len)
    else:
        near = nearest(best[0], base)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise SourceError(
            f"{foreign.reference}: {len(best)} of its {len(names)} tensors are not in "
            f"{base.reference}: {listed(best)}{hint}; is it the base that it was trained on?"
        )

    def own(name: str) -> str:
        return base.locate(rule(name)) or rule(name)

    made = Foreign(foreign.reference, parameters=foreign.parameters)
    made.added = {own(name): part for name, part in foreign.added.items()}
    made.replaced = {own(name): part for name, part in foreign.replaced.items()}
    made.whole = {own(name): tensor for name, tensor in foreign.whole.items()}
    return made


def require_inside(reference: str, name: str, part: Sparse, numel: int) -> None:
    """Refuse indices that do not increase, or lie outside the tensor."""
    steps = torch.diff(part.indices, prepend=torch.tensor([-1]))
    if len(part.indices) and (int(steps.min()) < 1 or int(part.indices[-1]) >= numel):
        raise SourceError(
            f"{name}: the delta's indices do not increase, or reach past the {numel} elements that "
            f"{reference} has: the file is damaged, or for another model"
        )


def write(
    foreign: Foreign, base: Source, out: Path, method: str, *, exact: bool, overwrite: bool
) -> Converted:
    """Write a delta file; `exact` stores what comes out, rounded, and what was there."""
    records: list[Record] = []
    with DeltaWriter(out, overwrite=overwrite) as writer:
        for name, part in sorted(foreign.added.items()):
            records += _sparse(writer, base, name, part, exact=exact, added=True)
        for name, part in sorted(foreign.replaced.items()):
            records += _sparse(writer, base, name, part, exact=True, added=False)
        for name, tensor in sorted(foreign.whole.items()):
            records.append(_whole(writer, base, name, tensor))
        if not records:
            raise SourceError(f"{foreign.reference}: changes nothing in {base.reference}")
        numel = sum(_numel(record) for record in records)
        entries = sum(record.entries for record in records)
        words = {
            "base": {"id": base.reference, "revision": base.revision},
            "method": method,
            "parameters": foreign.parameters,
            "density": entries / numel if numel else None,
            "seed": None,
            "provenance": {"converted_from": foreign.reference},
        }
        writer.commit(words, records)
    return Converted(out, len(records), entries)


def _numel(record: Record) -> int:
    size = 1
    for extent in record.shape:
        size *= extent
    return size


def _sparse(
    writer: DeltaWriter, base: Source, name: str, part: Sparse, *, exact: bool, added: bool
) -> Iterator[Record]:
    if not len(part.indices):
        return
    require_inside(base.reference, name, part, base[name].numel)
    info, held = base[name], base.tensor(name)
    code = coding(info.numel, coded(part.indices), len(part.indices))
    index = gaps(part.indices) if code == "gap16" else part.indices
    writer.append(name, "indices", index.int() if code == "int32" else index)
    if exact:
        before = held.flatten()[part.indices]
        wide = (
            torch.float64 if torch.float64 in (before.dtype, part.values.dtype) else torch.float32
        )
        after = before.to(wide) + part.values.to(wide) if added else part.values
        writer.append(name, "values", after.to(TORCH[info.dtype]))
        writer.append(name, "originals", before)
    else:
        writer.append(name, "values", part.values)
    kind = "replace" if exact else "add"
    digest = tensor_hash(base, name)
    yield Record(name, kind, info.dtype, info.shape, digest, len(part.indices), code)


def _whole(writer: DeltaWriter, base: Source, name: str, tensor: Tensor) -> Record:
    shapes, digest = {"values": tuple(tensor.shape)}, None
    writer.append(name, "values", tensor)
    if name in base:
        before = base.tensor(name)
        writer.append(name, "originals", before)
        shapes["originals"] = tuple(before.shape)
        digest = tensor_hash(base, name)
    size = tensor.numel()
    return Record(
        name, "dense", CODE[tensor.dtype], tuple(tensor.shape), digest, size, shapes=shapes
    )


# ---- the other way


def sums(delta: DeltaFile) -> Iterator[tuple[Change, Sparse]]:
    """Yield what each sparse change adds, in float32 (float64 where it is stored so)."""
    for change in delta.changes.values():
        if change.coding is None:
            continue
        entries = Entries(delta, change)
        indices, first = entries.within(0, change.numel)
        values = entries.values("values", first, len(indices))
        if change.kind == "replace":
            wide = torch.float64 if values.dtype == torch.float64 else torch.float32
            before = entries.values("originals", first, len(indices)).to(wide)
            values = values.to(wide) - before
        yield change, Sparse(indices, values)


def whole(delta: DeltaFile) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that stand in a delta whole."""
    for change in delta.changes.values():
        if change.kind == "dense":
            info = change.parts["values"]
            data = bytearray(info.nbytes)
            delta.reader.read_into(info, 0, memoryview(data))
            values = torch.frombuffer(data, dtype=TORCH[info.dtype]) if data else torch.empty(0)
            yield change.name, values.reshape(info.shape)


def refuse_kinds(delta: DeltaFile, kinds: Mapping[str, str], where: str) -> None:
    """Refuse changes that another format has no place for; `kinds` are those it has, and why."""
    odd = [c for c in delta.changes.values() if c.kind not in kinds]
    if odd:
        raise SourceError(
            f"{delta.reference}: {odd[0].name} is of kind {odd[0].kind}, for which {where} "
            f"has no place (it has one for {', '.join(kinds)})"
        )
