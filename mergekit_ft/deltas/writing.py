"""Write a delta file: parts arrive in runs, in bounded memory; commit or nothing.

How many entries a change has is known only when it was found, so the parts are spooled beside the
file that is made, and put in their order at the end: by the size of their elements, then by name,
so that every part is aligned and the bytes do not depend on who came first.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from mergekit_ft.blocks import view_of
from mergekit_ft.errors import WriteError
from mergekit_ft.sources.delta_file import FORMAT, VERSION, WORDS
from mergekit_ft.sources.dtypes import CODE, SIZE
from mergekit_ft.writer import Entry, OutFile

SUFFIX = ".safetensors"
COPIED = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class Record:
    """What is said of one tensor's change."""

    name: str
    kind: str
    dtype: str  # code of the model's tensor
    shape: tuple[int, ...]
    sha256: str | None  # of the base tensor's bytes
    entries: int
    coding: str | None = None
    scale: float = 1.0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of parts that are not
    # flat, by part

    def words(self) -> dict[str, Any]:
        """Return what the metadata says."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "sha256": self.sha256,
            "entries": self.entries,
            "coding": self.coding,
            "scale": self.scale,
        }


@dataclass
class _Part:
    """A part of a change, spooled: where its runs lie, in order."""

    dtype: str
    numel: int = 0
    runs: array[int] = field(default_factory=lambda: array("Q"))  # start, bytes, start, bytes, ...


class DeltaWriter:
    """Writes PATH.part and renames it to PATH as the last act; used as a context."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        if path.suffix != SUFFIX:
            raise WriteError(f"{path}: a delta is one file; give it a name that ends in {SUFFIX}")
        self.path, self.overwrite = path, overwrite
        self.part = path.with_name(path.name + ".part")
        self._spool_path = path.with_name(path.name + ".spool")
        self._parts: dict[tuple[str, str], _Part] = {}
        self._spool: BinaryIO | None = None

    def __enter__(self) -> DeltaWriter:
        if os.path.lexists(self.path) and not (self.overwrite and self.path.is_file()):
            is_file = self.path.is_file()
            out = "give --overwrite, or another name" if is_file else "give another name"
            raise WriteError(f"{self.path} exists; {out}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._spool = open(self._spool_path, "w+b")
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._spool is not None:
            self._spool.close()
        for path in (self._spool_path, self.part):
            path.unlink(missing_ok=True)

    def append(self, name: str, part: str, values: Tensor) -> None:
        """Add a run to the end of one part; the runs of others may come between."""
        spool = self._open_spool()
        held = self._parts.setdefault((name, part), _Part(CODE[values.dtype]))
        if CODE[values.dtype] != held.dtype:
            raise ValueError(f"{name}:{part} is {held.dtype}, not {CODE[values.dtype]}")
        flat = values.detach().contiguous().flatten().cpu()
        if not flat.numel():
            return
        try:
            held.runs.extend((spool.tell(), spool.write(view_of(flat))))
        except OSError as error:
            raise self._failure(error) from error
        held.numel += flat.numel()

    def join(self, name: str, part: str, others: Sequence[str]) -> None:
        """Make one part of several, one after the other: rows that were made side by side."""
        joined = [self._parts.pop((name, other)) for other in others]
        runs = array("Q")
        for held in joined:
            runs.extend(held.runs)
        self._parts[name, part] = _Part(joined[0].dtype, sum(h.numel for h in joined), runs)

    def drop(self, name: str, parts: Sequence[str]) -> None:
        """Leave out parts of a tensor that turned out not to change."""
        for part in parts:
            self._parts.pop((name, part), None)

    def numel(self, name: str, part: str) -> int:
        """Return how many elements of a part there are so far."""
        held = self._parts.get((name, part))
        return held.numel if held is not None else 0

    def commit(self, words: Mapping[str, Any], records: Iterable[Record]) -> None:
        """Write the file whole, make it durable, and give it its name.

        `words` are the metadata without `version` and `tensors`; see docs/delta-format.md.
        """
        by_name = {record.name: record for record in records}
        told = {"version": VERSION, **words}
        told["tensors"] = {name: by_name[name].words() for name in sorted(by_name)}
        text = json.dumps(told, sort_keys=True, ensure_ascii=False, allow_nan=False)
        keys = sorted(self._parts, key=lambda key: (-SIZE[self._parts[key].dtype], key))
        entries = tuple(self._entry(key, by_name) for key in keys)
        header = OutFile(self.path.name, entries, {"format": FORMAT, WORDS: text}).header()
        try:
            with open(self.part, "wb") as out:
                out.write(header)
                for key in keys:
                    self._copy(self._parts[key], out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(self.part, self.path)
        except OSError as error:
            raise self._failure(error) from error

    def _entry(self, key: tuple[str, str], records: Mapping[str, Record]) -> Entry:
        (name, part), held = key, self._parts[key]
        shape = records[name].shapes.get(part, (held.numel,))
        entry = Entry(f"{name}:{part}", held.dtype, shape)
        if entry.nbytes != held.numel * SIZE[held.dtype]:
            raise ValueError(f"{name}:{part} has {held.numel} elements, not {list(shape)}")
        return entry

    def _copy(self, part: _Part, out: BinaryIO) -> None:
        spool = self._open_spool()
        for start, nbytes in zip(part.runs[::2], part.runs[1::2], strict=True):
            spool.seek(start)
            for done in range(0, nbytes, COPIED):
                out.write(spool.read(min(COPIED, nbytes - done)))

    def _open_spool(self) -> BinaryIO:
        if self._spool is None:
            raise ValueError("a delta writer is used as a context")
        return self._spool

    def _failure(self, error: OSError) -> WriteError:
        free = shutil.disk_usage(self.path.parent).free if self.path.parent.is_dir() else 0
        return WriteError(
            f"{self.path}: cannot be written: {error.strerror or error} ({free >> 20} MiB free); "
            "nothing was left behind"
        )


def coding(numel: int, codes: int, entries: int) -> str:
    """Return the smallest coding of a tensor's indices; `codes` are those of 16 bits."""
    width = 4 if numel <= 2**31 else 8
    if 2 * codes < width * entries or not entries:
        return "gap16"
    return "int32" if width == 4 else "int64"
