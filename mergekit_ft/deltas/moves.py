"""What a file of whatever format does to one tensor, and how that comes out of a delta file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from mergekit_ft.blocks import view_of
from mergekit_ft.errors import SourceError, WriteError
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import Change, DeltaFile
from mergekit_ft.sources.dtypes import CODE, SIZE, TORCH
from mergekit_ft.sources.layout import listed

Kind = Literal["add", "replace", "dense"]


@dataclass(frozen=True)
class Move:
    """What becomes of one tensor; it is held in memory, alone."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    values: Tensor  # (n,) to add, (n,) that stand there then, or the whole tensor
    indices: Tensor | None = None  # (n,) int64, flat, row-major, increasing; None: the whole
    originals: Tensor | None = None  # (n,) of the base, or its whole tensor

    @property
    def digest(self) -> str:
        """Return a digest of the places and of the values, bit for bit."""
        sha = hashlib.sha256(f"{self.name} {self.kind} {self.shape} {self.values.dtype}".encode())
        for part in (self.indices, self.values):
            if part is not None and part.numel():
                sha.update(view_of(part.detach().contiguous().flatten()))
        return sha.hexdigest()


def moves_of(delta: DeltaFile) -> Iterator[Move]:
    """Yield what a delta file does, tensor by tensor; packs and products are refused by name."""
    whole = [c.name for c in delta.changes.values() if c.kind in ("low_rank", "mask")]
    if whole:
        raise SourceError(
            f"{delta.reference}: {listed(whole)}: a product of low rank or a pack is no set of "
            "entries, and cannot be converted: put it on its base, and `delta extract` from that"
        )
    for change in delta.changes.values():
        yield _move(delta, change)


def _move(delta: DeltaFile, change: Change) -> Move:
    if change.kind == "dense":
        values = _whole(delta, change, "values")
        originals = _whole(delta, change, "originals") if change.exact else None
        return Move(change.name, "dense", change.shape, values, None, originals)
    entries = Entries(delta, change)
    indices, _ = entries.within(0, change.numel)
    values = entries.values("values", 0, change.entries)
    if change.kind == "add":
        return Move(change.name, "add", change.shape, values, indices)
    originals = entries.values("originals", 0, change.entries)
    return Move(change.name, "replace", change.shape, values, indices, originals)


def _whole(delta: DeltaFile, change: Change, part: str) -> Tensor:
    held = change.parts[part]
    if not held.nbytes:
        return torch.empty(held.shape, dtype=TORCH[held.dtype])
    data = bytearray(held.numel * SIZE[held.dtype])
    delta.reader.read_into(held, 0, memoryview(data))
    return torch.frombuffer(data, dtype=TORCH[held.dtype]).view(held.shape)


def added(move: Move) -> tuple[Tensor, int]:
    """Return (n,) what entries gain, and how many do not become the values meant by adding it.

    The difference of two values of a dtype need not be a float32 (float64): such an entry comes
    out beside what was meant, in the last places.
    """
    if move.kind == "add":
        return move.values, 0
    assert move.originals is not None
    wide = torch.promote_types(move.values.dtype, torch.float32)
    difference = move.values.to(wide) - move.originals.to(wide)
    again = (move.originals.to(wide) + difference).to(move.values.dtype)
    return difference, int((again != move.values).sum())


def require_sound(move: Move, where: str) -> None:
    """Refuse values that are no numbers, and places that are none or stand twice."""
    if move.values.layout is not torch.strided or move.values.dtype not in CODE:
        raise SourceError(f"{where}: {move.name} is {move.values.layout}, {move.values.dtype}")
    if move.kind == "add" and not move.values.is_floating_point():
        raise SourceError(f"{where}: {move.name}: {move.values.dtype} is not added to weights")
    if move.values.is_floating_point() and not bool(torch.isfinite(move.values).all()):
        raise SourceError(f"{where}: {move.name} holds NaN or Inf: it is damaged, or diverged")
    if move.indices is None or not len(move.indices):
        return
    if int(move.indices[0]) < 0 or int(move.indices[-1]) >= prod(move.shape):
        raise SourceError(
            f"{where}: {move.name}: an index lies outside a tensor of {list(move.shape)}: the "
            "file is damaged"
        )
    if not bool((torch.diff(move.indices) > 0).all()):
        raise SourceError(f"{where}: {move.name}: an entry stands twice: the file is damaged")


def require_same(meant: dict[str, str], found: Iterable[Move], where: str) -> None:
    """Refuse what was written if it does not read as it was meant, bit for bit."""
    read = {move.name: move.digest for move in found}
    wrong = sorted(name for name in {*meant, *read} if meant.get(name) != read.get(name))
    if wrong:
        raise WriteError(
            f"{where}: read again, {listed(wrong)} is not what was written: the disk failed, or "
            "this is a fault of mergekit-ft; do not use the file"
        )
