"""What is known of weights without reading them: the same files, or digests that were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mergekit_ft.checkpoint import lock
from mergekit_ft.errors import MergekitError
from mergekit_ft.sources import Source, SourceFile
from mergekit_ft.sources.files import sha256_of_blob
from mergekit_ft.sources.sides import RECEIPT

Verdict = Literal["equal", "different", "unknown"]
Inode = tuple[int, int, int]  # device, number, size


def known(a: Source, b: Source) -> tuple[Verdict, str]:
    """Return whether the weights are equal, as far as that is known unread, and how it is."""
    if a is not a.on_disk or b is not b.on_disk:
        return "unknown", ""  # values are computed from the files
    mine, theirs = (list(source.inputs.values()) for source in (a, b))
    inodes = [sorted(map(_inode, files), key=str) for files in (mine, theirs)]
    if None not in inodes[0] and inodes[0] == inodes[1]:
        return "equal", "the weight files are the same files on disk"
    hashes = [_digests(source) for source in (a, b)]
    if not all(hashes):
        return "unknown", ""
    if sorted(hashes[0].values()) == sorted(hashes[1].values()):
        return "equal", "the SHA-256 recorded of the weight files are equal"
    return "different", "the SHA-256 recorded of the weight files differ"


def _inode(file: SourceFile) -> Inode | None:
    try:
        at = file.path.stat()
    except OSError:
        return None
    return at.st_dev, at.st_ino, at.st_size


def _digests(source: Source) -> Mapping[str, str]:
    """Return the digest of every weight file by name; nothing where one is not known."""
    recorded = _recorded(source)
    found = {
        name: file.sha256 or sha256_of_blob(file.path) or _from(recorded, name, file)
        for name, file in source.inputs.items()
    }
    return {name: digest for name, digest in found.items() if digest} if all(found.values()) else {}


def _recorded(source: Source) -> tuple[Mapping[str, Any], int]:
    """Return what a lock file says of the files beside it, and when it was written (ns)."""
    path = source.folder / RECEIPT if source.folder is not None else None
    if path is None or not path.is_file() or source.folder is None:
        return {}, 0
    try:
        return lock.read(source.folder)["outputs"], path.stat().st_mtime_ns
    except (MergekitError, OSError):
        return {}, 0


def _from(recorded: tuple[Mapping[str, Any], int], name: str, file: SourceFile) -> str | None:
    """Return what the lock file says of a file that was not touched since."""
    said, written = recorded
    entry = said.get(name)
    if not isinstance(entry, dict) or entry.get("size") != file.size or file.mtime_ns > written:
        return None
    digest = entry.get("sha256")
    return digest if isinstance(digest, str) else None
