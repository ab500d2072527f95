"""A model with a delta put on or taken off, as a source: every change finds its tensor."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import role_of
from mergekit_ft.registry import did_you_mean, nearest
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import Change, DeltaFile
from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.low_rank import LowRank, Product, Saved, Stored, add
from mergekit_ft.sources.masked import Mask, Masked
from mergekit_ft.sources.source import Source
from mergekit_ft.sources.tiles import (
    ComputedReader,
    Recent,
    Recipe,
    columns,
    stored_rows,
    tile_size,
)

INSIDE = "delta"  # the folder, in the list of a source's inputs, that its file stands under
HASHED = 4 << 20  # bytes at a time
_VALUES = {"add": "values", "low_rank": "a", "mask": "unified"}  # the part whose dtype decides
EXACT = ("replace", "dense")  # kinds that mean the very values that they hold


def patched(
    base: Source,
    delta: DeltaFile,
    *,
    scale: float = 1.0,
    revert: bool = False,
    task: str | None = None,
) -> Source:
    """Return base + scale * delta (of a pack: of a task), or what was before it was put on.

    Every change of the delta is used, or this raises. That the base's tensors are those that the
    delta was made for is checked when they are read, before a byte of them is given.
    """
    return _Landing(base, delta, scale, revert, task).source()


class _Landing:
    """Where the changes of one delta go in one model."""

    def __init__(
        self, base: Source, delta: DeltaFile, scale: float, revert: bool, task: str | None
    ) -> None:
        self.base, self.delta, self.scale, self.revert = base, delta, scale, revert
        self.task = task
        of = "" if task is None else f":{task}"
        self.reference = f"{base.reference}{'-' if revert else '+'}{delta.reference}{of}"
        self.infos: dict[str, TensorInfo] = dict(base)
        self.recipes: dict[str, Recipe] = {}
        self.edits: dict[str, Any] = {}
        self.recent = Recent()

    def source(self) -> Source:
        """Return the model as it becomes."""
        self._require_names()
        self._require_scale()
        for change in self.delta.changes.values():
            if self.revert:
                self._take_off(change)
            else:
                self._put_on(change)
        made = derived(
            self.base,
            self.infos.values(),
            ComputedReader(self.base.reader, self.recipes),
            reference=self.reference,
            inputs={f"{INSIDE}/{self.delta.path.name}": self.delta.file},
            edits=self.edits,
            notes=[self._note()],
        )
        made.delta = self.delta.reference
        return made

    def _require_names(self) -> None:
        """Refuse a delta of which some change has no tensor here, or is for another shape."""
        missing = [c.name for c in self.delta.changes.values() if self._should_be_there(c)]
        missing = [name for name in missing if name not in self.base]
        if missing:
            near = nearest(missing[0], self.base)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise SourceError(
                f"{self.reference}: {len(missing)} of the {len(self.delta.changes)} tensors of the "
                f"delta are not in {self.base.reference}: {listed(missing)}{hint}; it was made "
                f"for {self.delta.base}"
            )
        for change in self.delta.changes.values():
            info = self.base.get(change.name)
            if change.kind != "dense" and info is not None:
                self._require_like(change, info)

    def _should_be_there(self, change: Change) -> bool:
        return self.revert or change.sha256 is not None or change.kind != "dense"

    def _require_like(self, change: Change, info: TensorInfo) -> None:
        if (info.shape, info.dtype) != (change.shape, change.dtype):
            raise SourceError(
                f"{self.reference}: {change.name} is {info.dtype} {list(info.shape)} in "
                f"{self.base.reference}, and the delta is for {change.dtype} {list(change.shape)}; "
                f"it was made for {self.delta.base}"
            )

    def _require_scale(self) -> None:
        kinds = {change.kind: change.name for change in self.delta.changes.values()}
        require_task(self.delta, self.task, self.reference)
        exact = next((name for kind, name in kinds.items() if kind in EXACT), None)
        if self.scale != 1.0 and exact is not None:
            raise SourceError(
                f"{self.reference}: {exact} is replaced, so the delta cannot be scaled; `delta "
                "compose` makes of it what can, or merge it by task_arithmetic"
            )
        loose = [c.name for c in self.delta.changes.values() if not c.exact and not _is_new(c)]
        if self.revert and loose:
            raise SourceError(
                f"{self.reference}: {listed(loose)} cannot be taken off exactly: what was there "
                "before is not in the delta; take the base itself"
            )

    # ---- put on, taken off

    def _put_on(self, change: Change) -> None:
        name, info = change.name, self.base.get(change.name)
        if change.kind == "dense":
            self._become(change, "values")
            return
        assert info is not None
        stored = Stored(_Checked(self.base, change, self.delta, self.base.reader), info)
        if change.kind == "replace":
            self.recipes[name] = _Replaced(stored, Entries(self.delta, change), "values")
            return
        values = change.parts[_VALUES[change.kind]]
        wide = "F64" if "F64" in (info.dtype, values.dtype) else "F32"
        nbytes = info.numel * SIZE[wide]
        self.infos[name] = replace(info, dtype=wide, nbytes=nbytes, stored=info.kept)
        if change.kind == "add":
            entries = Entries(self.delta, change)
            self.recipes[name] = _Added(stored, entries, self.scale, TORCH[wide])
        elif change.kind == "mask":
            mask = Mask(self.delta, change, str(self.task))
            self.recipes[name] = Masked(stored, mask, self.scale, TORCH[wide])
        else:
            a, b = (Stored(self.delta.reader, change.parts[part]) for part in ("a", "b"))
            scale = self.scale * change.scale
            product = Product(f"{self.reference}: {name}", a, b, scale, False)
            self.recipes[name] = LowRank(stored, product, wide, self.recent)

    def _take_off(self, change: Change) -> None:
        if _is_new(change):
            del self.infos[change.name]
            return
        if change.kind == "dense":
            self._become(change, "originals")
            return
        stored = Stored(self.base.reader, self.base[change.name])
        self.recipes[change.name] = _Replaced(stored, Entries(self.delta, change), "originals")

    def _become(self, change: Change, part: str) -> None:
        """Put a whole tensor in the place of the model's."""
        held, name = change.parts[part], change.name
        old = self.base.get(name)
        file = self.base.files[0].name if old is None else old.file
        self.infos[name] = replace(held, name=name, file=file)
        reader: Reader = self.delta.reader
        if part == "values":  # of this base, not of another one
            reader = _Checked(self.base, change, self.delta, reader)
        self.recipes[name] = Saved(Stored(reader, held))
        if old is not None and old.shape != held.shape:
            self._resize(name, old, held)

    def _resize(self, name: str, old: TensorInfo, new: TensorInfo) -> None:
        """Let the config follow a vocabulary; no other tensor may have another shape."""
        rows = len(old.shape) == len(new.shape) == 2 and old.shape[1] == new.shape[1]
        if not rows or role_of(name) not in ("embedding", "head"):
            raise SourceError(
                f"{self.reference}: {name} would become {list(new.shape)} where "
                f"{self.base.reference} has {list(old.shape)}, and its config.json would not fit"
            )
        if self.base.config.get("vocab_size") == old.shape[0]:
            self.edits["vocab_size"] = new.shape[0]

    def _note(self) -> str:
        kinds: dict[str, int] = {}
        for change in self.delta.changes.values():
            kinds[change.kind] = kinds.get(change.kind, 0) + 1
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        word = "takes off" if self.revert else "changes"
        return (
            f"{self.reference}: the delta {word} {len(self.delta.changes)} of {len(self.base)} "
            f"tensors ({told}); made for {self.delta.base}"
        )


def _is_new(change: Change) -> bool:
    """Say whether the base has no such tensor."""
    return change.kind == "dense" and change.sha256 is None and not change.exact


class _Checked:
    """Reads once the bytes of a base's tensor were found to be those that a delta is for."""

    def __init__(self, base: Source, change: Change, delta: DeltaFile, below: Reader) -> None:
        self._base, self._change, self._delta, self._below = base, change, delta, below
        self._fine = change.sha256 is None
        self._lock = threading.Lock()
        self.overhead = below.overhead + base.reader.overhead + HASHED

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the tensor from `start` on."""
        with self._lock:
            if not self._fine:
                require_base(self._base, self._change, self._delta)
                self._fine = True
        self._below.read_into(info, start, into)

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Say that these bytes will be read soon."""
        self._below.will_need(info, start, nbytes)

    def close(self) -> None:
        """Give back what is held open."""
        self._below.close()


def tensor_hash(source: Source, name: str) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    sha, info = hashlib.sha256(), source[name]
    buffer = memoryview(bytearray(min(HASHED, info.nbytes)))
    for start in range(0, info.nbytes, HASHED):
        part = buffer[: min(HASHED, info.nbytes - start)]
        source.read_into(name, start, part)
        sha.update(part)
    return sha.hexdigest()


def require_task(delta: DeltaFile, task: str | None, where: str) -> None:
    """Refuse a pack without one of its tasks, and a task of what is no pack."""
    tasks = delta.tasks
    named = f"(tasks: {', '.join(tasks)})"
    if tasks and task is None:
        raise SourceError(
            f"{where}: is a pack of {len(tasks)} tasks: name one, "
            f"`delta: {{path: {delta.reference}, task: {tasks[0]}}}` {named}"
        )
    if task is not None and not tasks:
        raise SourceError(f"{delta.reference}: is no pack, so it has no task '{task}'")
    if task is not None and task not in tasks:
        raise SourceError(
            f"{delta.reference}: has no task '{task}'{did_you_mean(task, tasks)} {named}"
        )


def require_base(base: Source, change: Change, delta: DeltaFile) -> None:
    """Refuse a base whose tensor is not the one that a change was made for."""
    if change.sha256 is None:
        return
    found = tensor_hash(base, change.name)
    if found != change.sha256:
        raise SourceError(
            f"{delta.reference}: {change.name} of {base.reference} has SHA-256 {found}, and the "
            f"delta was made for {change.sha256}, of {delta.base}: put it on that model"
        )


class _Replaced:
    """A tensor of which some entries are those of a delta, as they are stored."""

    def __init__(self, base: Stored, entries: Entries, part: str) -> None:
        self.reader, self.stored = base.reader, base.info
        self._entries, self._part = entries, part
        self.overhead = Entries.overhead + 3 * SIZE[base.info.dtype] * tile_size(base.info)
        self.overhead += base.reader.overhead

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) as stored."""
        rows = stored_rows(self.reader, self.stored, first, stop)
        start = first * columns(self.stored)
        indices, before = self._entries.within(start, start + rows.numel())
        values = self._entries.values(self._part, before, len(indices))
        rows.view(-1)[indices - start] = values
        return rows

    def close(self) -> None:
        """Do nothing: what was kept is small."""


class _Added:
    """A tensor to some entries of which a delta adds."""

    def __init__(self, base: Stored, entries: Entries, scale: float, dtype: torch.dtype) -> None:
        self.reader, self.stored = base.reader, base.info
        self._entries, self._scale, self._dtype = entries, scale, dtype
        self.overhead = Entries.overhead + 4 * dtype.itemsize * tile_size(base.info)
        self.overhead += base.reader.overhead

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) in the dtype of the arithmetic."""
        rows = stored_rows(self.reader, self.stored, first, stop).to(self._dtype)
        start = first * columns(self.stored)
        indices, before = self._entries.within(start, start + rows.numel())
        values = self._entries.values("values", before, len(indices)).to(self._dtype)
        flat, at = rows.view(-1), indices - start
        flat[at] = add(flat[at], values.mul_(self._scale))
        return rows

    def close(self) -> None:
        """Do nothing: what was kept is small."""
