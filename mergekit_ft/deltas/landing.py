"""Moves of a foreign file, written as a delta of a base, and read again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.indices import coded, gaps
from mergekit_ft.deltas.moves import Move, moves_of, require_same, require_sound
from mergekit_ft.deltas.writing import DeltaWriter, Record, coding
from mergekit_ft.errors import SourceError
from mergekit_ft.registry import nearest
from mergekit_ft.sources.adapted import rules
from mergekit_ft.sources.delta_file import open_delta
from mergekit_ft.sources.dtypes import CODE, FLOATING
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.patched import tensor_hash
from mergekit_ft.sources.source import Source


@dataclass
class Landed:
    """What a delta file got."""

    tensors: int = 0
    entries: int = 0  # that may change
    whole: int = 0  # tensors that are stored whole
    idle: int = 0  # entries left out, because they change nothing


def naming(names: Sequence[str], base: Source, where: str) -> Callable[[str], str]:
    """Return what makes names the base's: nothing, or one change of prefix."""
    best = list(names)
    for rule in rules():
        missing = [name for name in names if base.locate(rule(name)) is None]
        if not missing and len({base.locate(rule(name)) for name in names}) == len(names):
            return rule
        best = min(best, missing or best, key=len)
    near = nearest(best[0], base)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise SourceError(
        f"{where}: {len(best)} of the {len(names)} tensors whose entries change are not in "
        f"{base.reference}: {listed(best)}{hint}; "
        "a prefix such as `bert.` or `model.` was looked for too: is it the model that this was "
        "made for?"
    )


def land(
    moves: Iterable[Move],
    base: Source,
    out: Path,
    words: Mapping[str, Any],
    *,
    replacing: bool,
    overwrite: bool,
) -> Landed:
    """Write moves, under the base's names, as a delta file; read it again and compare."""
    landed, meant, records = Landed(), dict[str, str](), list[Record]()
    with DeltaWriter(out, overwrite=overwrite) as writer:
        for move in moves:
            require_sound(move, str(words["provenance"]["converted_from"]))
            settled = _settled(move, base, replacing)
            if settled.indices is not None:
                settled = _without_idle(settled, landed)
                if not len(settled.values):
                    continue
            meant[settled.name] = settled.digest
            records.append(_write(writer, settled, base))
            landed.tensors += 1
        _require_some(records, str(words["provenance"]["converted_from"]))
        landed.entries = sum(record.entries for record in records)
        landed.whole = sum(r.coding is None for r in records)
        writer.commit({**words, "base": _identity(base), "density": None, "seed": None}, records)
    made = open_delta(out)
    try:
        require_same(meant, moves_of(made), str(out))
    finally:
        made.close()
    return landed


def _require_some(records: Sequence[Record], where: str) -> None:
    if not records:
        raise SourceError(f"{where}: changes nothing of the base: all its values are already there")


def _identity(base: Source) -> dict[str, str | None]:
    return {"id": base.reference, "revision": base.revision}


def _settled(move: Move, base: Source, replacing: bool) -> Move:
    """Return a move as it will be stored: in the base's dtype where values replace the base's."""
    info = base.get(move.name)
    if info is None:
        return _new(move, base)
    if info.shape != move.shape:
        raise SourceError(
            f"{move.name}: is {list(move.shape)} in what is converted, and {list(info.shape)} in "
            f"{base.reference}: name the base that it was made for"
        )
    if info.dtype not in FLOATING:
        raise SourceError(f"{move.name}: is {info.dtype} in {base.reference}, which does not add")
    if move.kind == "add" and not replacing:
        return move
    theta = base.tensor(move.name)
    if move.kind == "dense":
        return replace(move, values=move.values.to(theta.dtype), originals=theta)
    assert move.indices is not None
    originals = theta.flatten()[move.indices]
    values = move.values
    if move.kind == "add":
        wide = torch.promote_types(torch.promote_types(values.dtype, theta.dtype), torch.float32)
        values = originals.to(wide) + values.to(wide)
    values = values.to(theta.dtype)  # the one rounding
    settled = replace(move, kind="replace", values=values, originals=originals)
    require_sound(settled, f"{base.reference} with what is converted")
    return settled


def _new(move: Move, base: Source) -> Move:
    """Return a whole tensor that the base has not."""
    tied = base.ties.get(move.name)
    if move.kind != "dense" or tied is not None:
        why = f", where it is tied to {tied}: save it untied" if tied else ""
        raise SourceError(f"{move.name}: is not in {base.reference}{why}")
    return move


def _without_idle(move: Move, landed: Landed) -> Move:
    """Leave out entries that stay as they are."""
    assert move.indices is not None
    moved = move.values != 0
    if move.originals is not None:
        width = move.values.element_size()
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
        moved = move.values.view(bits) != move.originals.view(bits)
    landed.idle += int((~moved).sum())
    originals = None if move.originals is None else move.originals[moved]
    return replace(
        move, values=move.values[moved], indices=move.indices[moved], originals=originals
    )


def _write(writer: DeltaWriter, move: Move, base: Source) -> Record:
    name, known = move.name, tensor_hash(base, move.name) if move.name in base else None
    values = move.values
    writer.append(name, "values", values)
    if move.originals is not None:
        writer.append(name, "originals", move.originals)
    if move.indices is None:
        parts = ("values", "originals") if move.originals is not None else ("values",)
        shapes = dict.fromkeys(parts, move.shape)
        dtype, numel = CODE[values.dtype], values.numel()
        return Record(name, "dense", dtype, move.shape, known, numel, shapes=shapes)
    numel, count = prod(move.shape), len(values)
    code = coding(numel, coded(move.indices), count)
    writer.append(name, "indices", _indices(move.indices, code))
    return Record(name, move.kind, base[name].dtype, move.shape, known, count, code)


def _indices(indices: Tensor, code: str) -> Tensor:
    if code == "gap16":
        return gaps(indices)
    return indices.to(torch.int32 if code == "int32" else torch.int64)
