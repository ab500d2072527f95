"""Open files: a bounded number of descriptors, read at an offset by many threads."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.header import SourceFile, TensorInfo

LARGEST = 1 << 30  # bytes a call: some systems refuse more than 2**31 - 1
OPEN_AT_ONCE = 32  # descriptors of one source


class Reader(Protocol):
    """What gives a source its bytes; any thread may ask it."""

    overhead: int  # bytes that one worker may take for a read, besides what is filled

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Say that these bytes will be read soon."""

    def close(self) -> None:
        """Give back what is held open."""


@dataclass(slots=True)
class _Open:
    descriptor: int
    users: int = 0


class FileReader:
    """Reads tensors from files; opens them when needed, closes the least recently used."""

    overhead = 0

    def __init__(self, files: tuple[SourceFile, ...], limit: int = OPEN_AT_ONCE) -> None:
        self._files = {file.name: file for file in files}
        self._limit = limit
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        position, done = info.offset + start, 0
        with self._using(info.file) as descriptor:
            while done < len(into):
                got = self._read(descriptor, into[done : done + LARGEST], position + done, info)
                if not got:
                    raise SourceError(
                        f"{self._files[info.file].path}: truncated while it was being read: it "
                        f"ends within tensor {info.name!r}; fetch or save it again"
                    )
                done += got

    def _read(self, descriptor: int, into: memoryview, position: int, info: TensorInfo) -> int:
        try:
            return read_at(descriptor, into, position)
        except OSError as error:
            path = self._files[info.file].path
            raise SourceError(
                f"{path}: reading tensor {info.name!r} failed: {error.strerror or error}"
            ) from error

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Ask the system to read ahead, where it takes such advice."""
        if sys.platform == "linux":
            with self._using(info.file) as descriptor:
                os.posix_fadvise(descriptor, info.offset + start, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close every file that nobody reads."""
        with self._lock:
            self._shrink(0)

    @contextmanager
    def _using(self, name: str) -> Iterator[int]:
        """Hold a descriptor, so that no other thread closes it meanwhile."""
        with self._lock:
            entry = self._open.get(name)
            if entry is None:
                entry = self._open[name] = _Open(_descriptor(self._files[name]))
            entry.users += 1
            self._open.move_to_end(name)
            self._shrink(self._limit)
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.users -= 1

    def _shrink(self, limit: int) -> None:
        idle = [name for name, entry in self._open.items() if not entry.users]
        for name in idle[: max(0, len(self._open) - limit)]:
            os.close(self._open.pop(name).descriptor)


def _descriptor(file: SourceFile) -> int:
    """Open a file, unless it is no longer the one whose header was read."""
    path = file.path
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened: {error.strerror or error}") from error
    stat = os.fstat(descriptor)
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        os.close(descriptor)
        raise SourceError(
            f"{path}: changed since its header was read ({file.size} bytes then, {stat.st_size} "
            "now): start again when nothing writes to it"
        )
    return descriptor


_seeking = threading.Lock()


def read_at(descriptor: int, into: memoryview, position: int) -> int:
    """Read what one call gives from a position; return the number of bytes."""
    if sys.platform != "win32" and hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], position)
    with _seeking:  # a descriptor has one position
        os.lseek(descriptor, position, os.SEEK_SET)
        data = os.read(descriptor, len(into))
    into[: len(data)] = data
    return len(data)


class HeaderReader:
    """Stands where only the headers of a source were fetched."""

    overhead = 0

    def __init__(self, reference: str) -> None:
        self._reference = reference

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Refuse."""
        raise SourceError(
            f"{self._reference}: only its headers were fetched, not the bytes of {info.name!r}"
        )

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Do nothing: nothing will be read."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


def sha256_of_blob(path: Path) -> str | None:
    """Return the digest by which the hub's cache names the blob behind a path, if it does."""
    name = path.resolve().name
    known = path.is_symlink() and len(name) == 64 and not set(name) - set("0123456789abcdef")
    return name if known else None
