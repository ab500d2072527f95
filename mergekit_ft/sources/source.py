"""A checkpoint opened lazily: names, shapes and dtypes now, bytes on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import SourceFile, TensorInfo
from mergekit_ft.sources.ties import ties

if TYPE_CHECKING:
    import torch

COMPARED = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class Around:
    """What lies around the weights of a checkpoint."""

    folder: Path | None = None  # where side files lie
    index: dict[str, Any] | None = None  # the index as read, None without one
    config: dict[str, Any] = field(default_factory=dict)
    sides: tuple[str, ...] = ()  # every non-weight file, relative to the folder
    unread: tuple[str, ...] = ()  # weight files that were not chosen
    edits: Mapping[str, Any] = field(default_factory=dict)  # of config.json, where it no longer
    # holds: values by dotted key, None to leave a key out
    notes: tuple[str, ...] = ()  # what a user should know of how its tensors are read
    conflicts: tuple[str, ...] = ()  # in what it differs from the donor, besides its config
    replaced: Mapping[str, Path | bytes | None] = field(default_factory=dict)  # side files that
    # others stand for: a file to copy, content, or None for nothing
    tokens: Mapping[str, Any] = field(default_factory=dict)  # what became of its vocabulary


class Source(Mapping[str, TensorInfo]):
    """A mapping from names to what is known of each tensor, with readable bytes."""

    def __init__(
        self,
        reference: str,
        files: tuple[SourceFile, ...],
        reader: Reader,
        around: Around,
        revision: str | None = None,
        inputs: Mapping[str, SourceFile] | None = None,
    ) -> None:
        self.reference = reference  # as the plan names it
        self.revision = revision  # the commit, of a source on the hub
        self.files = files  # which tensor lies where; of a derived source, where it would lie
        self._derived = inputs is not None
        self.inputs = {file.name: file for file in files} if inputs is None else dict(inputs)
        self.folder = around.folder
        self.index = around.index
        self.config = around.config
        self.unread = around.unread
        self.edits = around.edits
        self.notes = around.notes
        self.around = around
        self._sides = around.sides
        self.reader = reader
        self.origins: tuple[Source, ...] = ()  # the sources that this one is computed from
        self.on_disk = self  # as it lies on disk
        self.adapter: tuple[str, str | None] | None = None  # its reference and commit, if on one
        self.delta: str | None = None  # the reference of the delta that is on it
        self._tensors = _by_name(reference, files)
        self.ties = ties(self.config, self._tensors)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __str__(self) -> str:
        return f"{self.reference}@{self.revision}" if self.revision else self.reference

    def __repr__(self) -> str:
        return f"Source({self.reference!r}, {len(self)} tensors)"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def locate(self, name: str) -> str | None:
        """Return the tensor that answers for a name: itself, the one it is tied to, or None."""
        if name in self._tensors:
            return name
        tied = self.ties.get(name)
        return tied if tied in self._tensors else None

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with a tensor's bytes from byte `start` on."""
        info, into = self._tensors[name], into.cast("B")
        self._check(info, start, len(into))
        self.reader.read_into(info, start, into)

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Say that these bytes of a tensor will be read soon."""
        info = self._tensors[name]
        self._check(info, start, nbytes)
        if nbytes:
            self.reader.will_need(info, start, nbytes)

    def _check(self, info: TensorInfo, start: int, count: int) -> None:
        if start < 0 or start + count > info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, not {start}..{start + count}")

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor in its stored dtype and memory of its own."""
        import torch

        from mergekit_ft.sources.dtypes import TORCH

        info = self._tensors[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=TORCH[info.dtype])
        data = bytearray(info.nbytes)
        self.read_into(name, 0, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[info.dtype]).reshape(info.shape)

    def agrees(self, name: str) -> bool:
        """Say whether a tied name, if present, holds the bytes of the tensor it is tied to."""
        if name not in self._tensors or name not in self.ties:
            return True
        mine, other = self._tensors[name], self._tensors[self.ties[name]]
        if (mine.dtype, mine.shape) != (other.dtype, other.shape):
            return False
        return all(
            self._bytes(mine, start) == self._bytes(other, start)
            for start in range(0, mine.nbytes, COMPARED)
        )

    def _bytes(self, info: TensorInfo, start: int) -> bytearray:
        data = bytearray(min(COMPARED, info.nbytes - start))
        self.read_into(info.name, start, memoryview(data))
        return data

    def side_files(self) -> list[Path]:
        """Return every non-weight file, relative to the folder, custom code apart."""
        return [Path(*PurePosixPath(name).parts) for name in self._sides if name[-3:] != ".py"]

    def code_files(self) -> list[Path]:
        """Return the custom code, relative to the folder."""
        return [Path(*PurePosixPath(name).parts) for name in self._sides if name[-3:] == ".py"]

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Return name, size and time (ns) of each weight file as they were when opened."""
        return [(name, file.size, file.mtime_ns) for name, file in self.inputs.items()]

    def behind(self, name: str) -> list[SourceFile]:
        """Return the files on disk that a tensor's bytes come from, or may come from."""
        if self._derived:
            return list(self.inputs.values())
        return [self.inputs[self._tensors[name].file]]

    def close(self) -> None:
        """Give back what is held open; reading again opens it again."""
        self.reader.close()


def _by_name(reference: str, files: tuple[SourceFile, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in file.tensors:
            if info.name in tensors:
                raise SourceError(
                    f"{reference}: tensor {info.name!r} is in {tensors[info.name].file} and in "
                    f"{file.name}: remove the file that does not belong"
                )
            tensors[info.name] = info
    if not tensors:
        raise SourceError(f"{reference}: its weight files hold no tensors")
    return tensors
