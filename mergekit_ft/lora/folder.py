"""Write the folder of an adapter: tensors as they come, then words; commit or nothing.

How large the factors are is known only when they were found, so they are spooled within OUT.part
and put in order at the end: by the size of their elements, then by name, so that the bytes do not
depend on who came first.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from mergekit_ft.blocks import view_of
from mergekit_ft.errors import WriteError
from mergekit_ft.sources.adapter import SAFE
from mergekit_ft.sources.dtypes import CODE, SIZE
from mergekit_ft.sources.sides import RECEIPT
from mergekit_ft.writer import Entry, OutFile

SPOOL = "mergekit_ft.spool"
COPIED = 1 << 20  # bytes at a time
SPARE = 16 << 20  # bytes of disk left for what is beside the weights


class AdapterFolder:
    """Makes OUT.part and renames it to OUT as the last act; used as a context."""

    def __init__(self, out: Path, inputs: Sequence[Path], *, overwrite: bool = False) -> None:
        if out.name in ("", ".."):
            raise WriteError(f"{out} has no name of its own; name the folder to be made: ./adapter")
        self.out, self.overwrite = out, overwrite
        self.part = out.with_name(out.name + ".part")
        self._inputs, self._entries = inputs, dict[str, tuple[Entry, int]]()
        self._spool: BinaryIO | None = None
        self._lock = threading.Lock()
        self._made = False
        self.nbytes = 0  # of the weights, once they are sealed

    def __enter__(self) -> AdapterFolder:
        self._refuse_inputs()
        self._refuse_what_is_there()
        try:
            if self.part.exists():
                shutil.rmtree(self.part)
            self.part.mkdir(parents=True)
            self._made = True
            self._spool = open(self.part / SPOOL, "w+b")
        except OSError as error:
            self.__exit__(None, None, None)
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
        if self._made:
            shutil.rmtree(self.part, ignore_errors=True)

    def append(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; called from any thread."""
        flat = tensor.detach().contiguous().flatten().cpu()
        self.append_runs(name, CODE[flat.dtype], tuple(tensor.shape), [view_of(flat)])

    def append_runs(
        self, name: str, dtype: str, shape: tuple[int, ...], runs: Iterable[memoryview | bytearray]
    ) -> None:
        """Take a tensor run by run."""
        assert self._spool is not None
        entry = Entry(name, dtype, shape)
        with self._lock:
            if name in self._entries:
                raise WriteError(f"{self.out}: {name} would be written twice")
            self._entries[name] = (entry, self._spool.tell())
            try:
                self._require_space(entry.nbytes)
                written = sum(self._spool.write(run) for run in runs)
            except OSError as error:
                raise self._failure(error) from error
            if written != entry.nbytes:
                raise ValueError(f"{name} has {entry.nbytes} bytes, and {written} came")

    def seal(self, words: Mapping[str, Any], name: str) -> None:
        """Write the weights in order, and the words of the config under a name."""
        assert self._spool is not None
        held = sorted(self._entries.values(), key=lambda e: (-SIZE[e[0].dtype], e[0].name))
        file = OutFile(SAFE, tuple(entry for entry, _ in held), {"format": "pt"})
        try:
            with open(self.part / SAFE, "wb") as weights:
                weights.write(file.header())
                for entry, start in held:
                    self._copy(entry, start, weights)
                self.nbytes = weights.tell()
            self._spool.close()
            (self.part / SPOOL).unlink()
        except OSError as error:
            raise self._failure(error) from error
        self.write(name, json.dumps(words, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of text beside the weights."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file beside the weights."""
        try:
            (self.part / name).write_bytes(data)
        except OSError as error:
            raise self._failure(error) from error

    def commit(self, receipt: Mapping[str, Any]) -> None:
        """Write the receipt, make everything durable, and give the folder its name."""
        self.write(RECEIPT, json.dumps(receipt, indent=2, ensure_ascii=False) + "\n")
        replaced = self.out.with_name(self.out.name + ".mergekit_ft.replaced")
        try:
            for path in (*self.part.iterdir(), self.part):
                _sync(path)
            if self.out.exists() and any(self.out.iterdir()):
                shutil.rmtree(replaced, ignore_errors=True)
                self.out.rename(replaced)
            elif self.out.exists():
                self.out.rmdir()
            self.part.rename(self.out)
            self._made = False
            _sync(self.out.resolve().parent)
        except OSError as error:
            raise self._failure(error) from error
        shutil.rmtree(replaced, ignore_errors=True)

    def _copy(self, entry: Entry, start: int, to: BinaryIO) -> None:
        assert self._spool is not None
        self._spool.seek(start)
        for done in range(0, entry.nbytes, COPIED):
            to.write(self._spool.read(min(COPIED, entry.nbytes - done)))

    def _refuse_inputs(self) -> None:
        """Refuse an OUT that would replace what is read."""
        place = self.out.resolve()
        for path in self._inputs:
            real = path.resolve()
            if real.is_relative_to(place) or (real.is_dir() and place.is_relative_to(real)):
                raise WriteError(
                    f"{self.out} is, holds or lies in {path}, which is read; name another folder"
                )

    def _refuse_what_is_there(self) -> None:
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise WriteError(
                f"{self.out} is a file or a link; name a folder that does not exist yet"
            )
        if self.out.is_dir() and any(self.out.iterdir()) and not self.overwrite:
            raise WriteError(f"{self.out} is not empty; name another folder, or give --overwrite")
        if not os.path.lexists(self.part):
            return
        if not self._ours():
            raise WriteError(f"{self.part} is in the way; move it, or name another folder")
        if any(self.part.iterdir()) and not self.overwrite:
            raise WriteError(f"{self.part} is what a stopped run left; --overwrite starts again")

    def _ours(self) -> bool:
        """Say whether OUT.part is empty, or left by a run that was killed."""
        if self.part.is_symlink() or not self.part.is_dir():
            return False
        held = {path.name for path in self.part.iterdir()}
        return not held or bool(held & {SPOOL, SAFE})

    def _require_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.part).free
        if free < 2 * nbytes + SPARE:
            raise WriteError(f"{self.out}: the disk has {free:,} bytes free, too few; make room")

    def _failure(self, error: OSError) -> WriteError:
        return WriteError(
            f"{self.out}: cannot be written: {error.strerror or error}; nothing was left behind"
        )


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
