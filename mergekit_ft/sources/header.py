"""The header of a safetensors file, read as hostile input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.dtypes import SIZE, SUB_BYTE

PREFIX = 8  # bytes: the header's length, little endian
LONGEST = 100_000_000  # bytes of a header, as the format's own reader has it
KEYS = {"dtype", "shape", "data_offsets"}
MOST = 2**63 - 1  # elements: what an index of torch can count


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: str  # safetensors code
    shape: tuple[int, ...]
    file: str  # name within the folder
    offset: int  # of the first byte in that file
    nbytes: int
    stored: str = ""  # code that the output takes where the plan says nothing, if not `dtype`

    @property
    def kept(self) -> str:
        """Return the dtype that the output takes where the plan says nothing."""
        return self.stored or self.dtype

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class SourceFile:
    """One weight file and what lies in it."""

    name: str  # as it is, or would be, called in a safetensors checkpoint
    path: Path  # where it lies, unless only its header was fetched
    size: int  # bytes
    metadata: dict[str, str]  # the header's `__metadata__`
    tensors: tuple[TensorInfo, ...]  # in order of offset
    mtime_ns: int = 0
    sha256: str | None = None  # as the hub states it


def read_file(path: Path, name: str) -> SourceFile:
    """Read and check the header of one file."""
    try:
        with open(path, "rb", buffering=0) as stream:
            return _read(stream, path, name)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(stream: BinaryIO, path: Path, name: str) -> SourceFile:
    stat = os.fstat(stream.fileno())
    prefix = _exactly(stream, min(PREFIX, stat.st_size), path)
    length = header_length(prefix, stat.st_size, str(path))
    metadata, tensors = parse(_exactly(stream, length, path), stat.st_size, name, str(path))
    return SourceFile(name, path, stat.st_size, metadata, tensors, stat.st_mtime_ns)


def _exactly(stream: BinaryIO, count: int, path: Path) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            raise SourceError(
                f"{path}: truncated: the file ends within its header; fetch or save it again"
            )
        data += more
    return bytes(data)


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Return the length of the header that the first 8 bytes announce, in bytes."""
    if len(prefix) < PREFIX or size < PREFIX + 2:
        raise SourceError(f"{where}: not a safetensors file: {size} bytes cannot hold a header")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > LONGEST:
        raise SourceError(
            f"{where}: not a safetensors file: a header of {length} bytes is announced, "
            f"at most {LONGEST} are allowed"
        )
    if length > size - PREFIX:
        raise SourceError(
            f"{where}: truncated: the header alone needs {PREFIX + length} bytes, the file has "
            f"{size}; fetch or save it again"
        )
    return length


def parse(
    raw: bytes, size: int, name: str, where: str
) -> tuple[dict[str, str], tuple[TensorInfo, ...]]:
    """Check a header against the size of its file; return its metadata and tensors."""
    try:
        entries = _object(raw)
        metadata = _metadata(entries.pop("__metadata__", {}))
        start = PREFIX + len(raw)
        tensors = [_tensor(key, entry, name, start) for key, entry in entries.items()]
        tensors.sort(key=lambda info: (info.offset, info.nbytes))
        _contiguous(tensors, start, size)
    except _FormatError as fault:
        raise SourceError(f"{where}: {fault}") from None
    return metadata, tuple(tensors)


class _FormatError(ValueError):
    """A fault of a header, without its place."""


def _object(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _FormatError("not a safetensors file: its header is not a JSON object")
    try:
        entries: dict[str, Any] = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_int=_natural,
        )
    except _FormatError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        raise _FormatError(f"its header is not JSON in UTF-8: {reason}") from None
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) == len(pairs):
        return entries
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _FormatError(f"its header names {key!r} twice")
        seen.add(key)
    return entries


def _refuse(word: str) -> None:
    raise _FormatError(f"its header holds {word}, which is not JSON")


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise _FormatError(f"its header holds a negative number: {digits[:40]}")
    return int(digits)


def _metadata(entries: object) -> dict[str, str]:
    if not isinstance(entries, dict):
        raise _FormatError("`__metadata__` is not a map of strings")
    for key, value in entries.items():
        if not isinstance(value, str):
            raise _FormatError(f"`__metadata__` has a value that is not a string: {key!r}")
        _check_text(key)
        _check_text(value)
    return entries


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _FormatError(f"its header holds half a character: {text!r}")


def _tensor(name: str, entry: object, file: str, start: int) -> TensorInfo:
    _check_text(name)
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise _FormatError(f"tensor {name!r} needs dtype, shape and data_offsets, and no more")
    width = _width(name, entry["dtype"])
    shape, ends = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(ends) or len(ends) != 2:
        raise _FormatError(f"tensor {name!r}: shape and data_offsets must be whole numbers")
    begin, end = ends
    if begin > end:
        raise _FormatError(f"tensor {name!r} ends at byte {end}, before it begins at {begin}")
    needed = _numel(name, shape) * width
    if needed != end - begin:
        raise _FormatError(
            f"tensor {name!r}: {entry['dtype']} of shape {shape} takes {needed} bytes, "
            f"its data_offsets hold {end - begin}"
        )
    return TensorInfo(name, entry["dtype"], tuple(shape), file, start + begin, needed)


def _width(name: str, dtype: object) -> int:
    """Return the bytes an element takes."""
    if isinstance(dtype, str) and dtype in SIZE:
        return SIZE[dtype]
    if isinstance(dtype, str) and dtype in SUB_BYTE:
        raise _FormatError(
            f"tensor {name!r} has dtype {dtype}, of less than a byte an element, which is not "
            "supported: use the checkpoint it was quantised from"
        )
    raise _FormatError(
        f"tensor {name!r} has dtype {dtype!r}, which is not supported: save it as one of "
        + ", ".join(SIZE)
    )


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _numel(name: str, shape: Iterable[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
        if count > MOST:
            raise _FormatError(f"tensor {name!r}: its shape counts more elements than can be")
    return count


def _contiguous(tensors: Iterable[TensorInfo], start: int, size: int) -> None:
    """Check that the tensors fill the file: no overlap, no hole, no byte missing or left over."""
    here, before = start, "the header"
    for info in tensors:
        if info.offset < here:
            raise _FormatError(f"tensor {info.name!r} overlaps {before!r} in the file")
        if info.offset > here:
            gap = info.offset - here
            raise _FormatError(f"a hole of {gap} bytes between {before!r} and {info.name!r}")
        here, before = info.offset + info.nbytes, info.name
    if here > size:
        raise _FormatError(
            f"truncated: {here} bytes expected, the file has {size}; fetch or save it again"
        )
    if here < size:
        raise _FormatError(
            f"{size - here} bytes after the last tensor: {here} bytes expected, the file has {size}"
        )
