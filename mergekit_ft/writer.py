"""The writer: headers first, bytes at known offsets, a journal, commit or nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mergekit_ft.errors import WriteError
from mergekit_ft.journal import Journal, refuse_if_held
from mergekit_ft.sources.dtypes import SIZE
from mergekit_ft.sources.sides import RECEIPT

JOURNAL = "mergekit_ft.journal.jsonl"  # a name that no side file of a base has
BATCH = 256 << 20  # bytes between two entries of the journal
SPARE = 16 << 20  # bytes of disk left for side files, the index and the lock


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes it takes."""
        size = SIZE[self.dtype]
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class OutFile:
    """A safetensors file to be written: its tensors in the order of their bytes."""

    name: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str]

    def header(self) -> bytes:
        """Return the bytes before the first tensor, padded to 8."""
        words: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        begin = 0
        for entry in self.entries:
            end = begin + entry.nbytes
            words[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(words, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class Growth:
    """How far a file is written without a gap, for one who reads it from the start."""

    def __init__(self, size: int) -> None:
        self.size, self.end = size, 0
        self._apart: dict[int, int] = {}  # start -> stop of runs beyond the gap
        self._lock = threading.Lock()

    def add(self, start: int, stop: int) -> None:
        """Say that these bytes are written."""
        with self._lock:
            if stop > start:
                self._apart[start] = stop
            while self.end in self._apart:
                self.end = self._apart.pop(self.end)


class Writer:
    """Writes OUT.part and renames it to OUT as the last act; used as a context."""

    def __init__(
        self, out: Path, files: Sequence[OutFile], identity: str, resume: bool, overwrite: bool
    ) -> None:
        if out.name in ("", ".."):
            raise WriteError(f"{out} has no name of its own; name the folder to be made: ./merged")
        self.out, self.files, self.identity = out, files, identity
        self.resume, self.overwrite = resume, overwrite
        self.part = out.with_name(out.name + ".part")
        self.replaced = out.with_name(out.name + ".mergekit_ft.replaced")
        self.complete = False  # an earlier run did everything but the last rename, or all
        self.findings: dict[str, Any] = {}  # of surveys over the whole model
        self.changed: dict[str, bool] = {}  # by finished tensor: whether it differs from the base
        self.rounded: dict[str, list[float]] = {}  # by finished tensor: sums of what rounding left
        self._headers = {file.name: file.header() for file in files}
        self._places = dict(_offsets(files, self._headers))
        self._growth = {name: Growth(size) for name, size in self.sizes().items()}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._pending_bytes = 0
        self._journal: Journal | None = None

    def sizes(self) -> dict[str, int]:
        """Return the final size of each file in bytes."""
        return {
            file.name: len(self._headers[file.name]) + sum(e.nbytes for e in file.entries)
            for file in self.files
        }

    def growth(self, file: str) -> Growth:
        """Return how far a file is written."""
        return self._growth[file]

    def __enter__(self) -> Writer:
        self.complete = self.resume and self._is_complete(self.out)
        if self.complete:
            return self
        self._refuse_what_is_there()
        self.complete = self.resume and self._is_complete(self.part)
        if self.complete:
            return self
        try:
            self._clear_part()
            self._check_space()
            self.part.mkdir(parents=True, exist_ok=True)
            self._open_journal()
            for file in self.files:
                self._open(file.name)
        except OSError as error:
            self._close()
            raise self._failure(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._journal is not None:
            keep = isinstance(error, (WriteError, KeyboardInterrupt))
            try:
                if keep:
                    self._flush()
            finally:
                self._close()
            if not keep:
                shutil.rmtree(self.part, ignore_errors=True)
        self._close()

    def write(self, tensor: str, start: int, data: memoryview) -> tuple[str, int]:
        """Write bytes of a tensor, from its byte `start` on; return the file and where in it."""
        file, begin = self._places[tensor]
        position, done = begin + start, 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptors[file], data[done:], position + done)
        except OSError as error:
            raise self._failure(error) from error
        self._growth[file].add(position, position + len(data))
        return file, position

    def finish(
        self, tensor: str, nbytes: int, changed: bool, rounded: Sequence[float] | None = None
    ) -> None:
        """Note in the journal that a tensor is whole."""
        with self._lock:
            self._book.note_tensor(tensor, changed, rounded)
            self._pending_bytes += nbytes
            if self._pending_bytes >= BATCH:
                self._flush()

    def note_finding(self, key: str, finding: Any) -> Any:
        """Note in the journal what a survey over the whole model found."""
        with self._lock:
            self._book.note_finding(key, finding)
            self._flush()
        return finding

    def commit(self, receipt: dict[str, Any]) -> None:
        """Write the receipt, make everything durable, and rename OUT.part to OUT."""
        try:
            if not self.complete:
                self._write_receipt(receipt)
                self._close()
                (self.part / JOURNAL).unlink()
                _sync_folder(self.part)
            if not self.complete or self._is_complete(self.part):
                self._rename()
        except OSError as error:
            raise self._failure(error) from error

    def _write_receipt(self, receipt: dict[str, Any]) -> None:
        self._flush()
        for path in self.part.rglob("*"):
            if path.is_file() and path.name != JOURNAL:
                _sync(path)
        draft = self.part / (RECEIPT + ".draft")
        text = json.dumps({"identity": self.identity, **receipt}, indent=2, ensure_ascii=False)
        draft.write_text(text + "\n", encoding="utf-8")
        _sync(draft)
        draft.replace(self.part / RECEIPT)

    def _rename(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.out.rename(self.replaced)
        elif self.out.exists():
            self.out.rmdir()
        self.part.rename(self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _is_complete(self, folder: Path) -> bool:
        """Say whether a folder holds what this plan makes, whole."""
        if (folder / JOURNAL).exists():
            return False
        try:
            receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(receipt, dict) and receipt.get("identity") == self.identity

    def _refuse_what_is_there(self) -> None:
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise WriteError(
                f"{self.out} is a file or a link; name a folder that does not exist yet"
            )
        if self.out.is_dir() and any(self.out.iterdir()) and not self.overwrite:
            raise WriteError(f"{self.out} is not empty; name another folder, or give --overwrite")

    def _clear_part(self) -> None:
        """Make way for a new run, unless another one is at work."""
        if not self.part.exists() or (self.part.is_dir() and not any(self.part.iterdir())):
            return
        if not any((self.part / name).exists() for name in (JOURNAL, RECEIPT)):
            raise WriteError(f"{self.part} is not what a run of ours left; move it out of the way")
        refuse_if_held(self.part / JOURNAL)
        if not self.resume:
            if not self.overwrite:
                raise WriteError(
                    f"{self.part} is what a stopped run left; --resume finishes it, --overwrite "
                    "starts again"
                )
            shutil.rmtree(self.part)

    def _check_space(self) -> None:
        there = sum(path.stat().st_blocks * 512 for path in self.part.glob("*.safetensors"))
        need = max(0, sum(self.sizes().values()) - there) + SPARE
        folder = next(path for path in self.out.resolve().parents if path.exists())
        free = shutil.disk_usage(folder).free
        if free < need:
            raise WriteError(
                f"{folder} has {free:,} bytes free and the output takes {need:,}; make room, or "
                "name a folder on another disk"
            )

    def _open_journal(self) -> None:
        """Take up the journal of the run that is resumed, or begin one."""
        self._journal = Journal(self.part / JOURNAL, self.identity)
        self.findings, self.changed = self._journal.findings, self._journal.changed
        self.rounded = self._journal.rounded

    def _open(self, name: str) -> None:
        """Open an output file at its final size, with its header in place."""
        descriptor = os.open(self.part / name, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptors[name] = descriptor
        os.ftruncate(descriptor, self._growth[name].size)
        header = self._headers[name]
        os.pwrite(descriptor, header, 0)
        self._growth[name].add(0, len(header))
        for file in self.files:
            for entry in file.entries if file.name == name else ():
                if entry.name in self.changed:
                    begin = self._places[entry.name][1]
                    self._growth[name].add(begin, begin + entry.nbytes)

    def _flush(self) -> None:
        """Make what was written durable, then say so in the journal."""
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            if self._journal is not None:
                self._journal.flush()
        except OSError as error:
            raise self._failure(error) from error
        self._pending_bytes = 0

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @property
    def _book(self) -> Journal:
        assert self._journal is not None
        return self._journal

    def _failure(self, error: OSError) -> WriteError:
        kept = "; what was written is kept: --resume goes on from there"
        return WriteError(f"{self.part}: {error.strerror or error}{kept if self._journal else ''}")


def _offsets(
    files: Sequence[OutFile], headers: dict[str, bytes]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield each tensor with its file and the offset of its first byte."""
    for file in files:
        position = len(headers[file.name])
        for entry in file.entries:
            yield entry.name, (file.name, position)
            position += entry.nbytes


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        _sync(folder)
