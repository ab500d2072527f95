"""Files that a report is written to: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mergekit_ft.errors import WriteError


def require_room(path: Path, *, overwrite: bool) -> None:
    """Refuse, before there is work, a place where a file cannot be written."""
    if path.is_dir():
        raise WriteError(f"{path}: is a folder; name the file to write")
    if path.exists() and not overwrite:
        raise WriteError(f"{path}: exists; --overwrite replaces it")
    if not path.parent.is_dir():
        raise WriteError(f"{path}: there is no folder {path.parent}; make it first")


def write(path: Path, content: str | bytes, *, overwrite: bool) -> None:
    """Write a file beside its place, then put it there."""
    require_room(path, overwrite=overwrite)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error
