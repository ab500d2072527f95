"""What stands beside an adapter's weights: the receipt, and the digests of all that went in."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from mergekit_ft import __version__
from mergekit_ft.checkpoint.digests import Digests
from mergekit_ft.errors import SourceError
from mergekit_ft.lora.folder import AdapterFolder
from mergekit_ft.sources import SourceFile

FORMAT = 1
CARD = "README.md"


class Read(Protocol):
    """A model or an adapter that was read."""

    reference: str
    revision: str | None
    inputs: dict[str, SourceFile]

    @property
    def folder(self) -> Path | None:
        """Return its folder, if it has one."""


def places(source: Read) -> list[Path]:
    """Return where a source lies: its folder, or its files."""
    return [source.folder] if source.folder is not None else _files(source)


def _files(source: Read) -> list[Path]:
    return [file.path for file in source.inputs.values()]


def name_of(source: Read) -> str:
    """Return a source's name without its revision, where it has one."""
    return source.reference.partition("@")[0] if source.revision else source.reference


class Inputs:
    """Hashes all that is read, beside the work; used as a context."""

    def __init__(self, sources: Sequence[Read], threads: int) -> None:
        self._sources = {source.reference: source for source in sources}
        self._digests = Digests(threads)

    def __enter__(self) -> Inputs:
        for source in self._sources.values():
            for path in _files(source):
                self._digests.start(path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._digests.close()

    def words(self) -> list[dict[str, Any]]:
        """Return what the receipt says of the sources."""
        return [
            {
                "reference": source.reference,
                "revision": source.revision,
                "files": {name: self._identified(file) for name, file in source.inputs.items()},
            }
            for source in self._sources.values()
        ]

    def recorded(self, path: Path) -> dict[str, Any]:
        """Return the size and the digest of a file that was written."""
        return {"size": path.stat().st_size, "sha256": self._digests.of(path)}

    def _identified(self, file: SourceFile) -> dict[str, Any]:
        digest, now = self._digests.of(file.path), file.path.stat()
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            raise SourceError(
                f"{file.path}: changed while it was read: start again when nothing writes to it"
            )
        return {"size": file.size, "sha256": digest}


def surround(
    folder: AdapterFolder,
    kind: str,
    options: Mapping[str, Any],
    report: Mapping[str, Any],
    card: str,
    inputs: Inputs,
) -> None:
    """Write the card and the receipt, and commit."""
    sources = inputs.words()
    folder.write(CARD, card)
    names = sorted(path.name for path in folder.part.iterdir())
    folder.commit(
        {
            "format": FORMAT,
            "kind": kind,
            "versions": {
                "mergekit_ft": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
            },
            "options": dict(options),
            "sources": sources,
            "outputs": {name: inputs.recorded(folder.part / name) for name in names},
            "report": dict(report),
        }
    )
