"""Checkpoints opened lazily: a folder of safetensors or a repo on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.folder import open_folder
from mergekit_ft.sources.header import SourceFile, TensorInfo
from mergekit_ft.sources.source import Source

__all__ = ["Source", "SourceFile", "TensorInfo", "open_source"]

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[^\s@]+))?")


def open_source(
    reference: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    allow_pickle: bool = False,
    headers_only: bool = False,
    endpoint: str | None = None,
) -> Source:
    """Open a folder, or `org/name` with an optional `@revision` on the hub."""
    path = _expanded(reference)
    if path.is_dir():
        if revision is not None:
            raise SourceError(
                f"{reference}: a folder has no revision ({revision!r} was asked for): leave it out"
            )
        return open_folder(path, reference, allow_pickle=allow_pickle)
    if path.exists():
        raise _a_file(reference, path)
    repo, revision = _hub_id(reference, revision)
    from mergekit_ft.sources.hub import open_repo

    return open_repo(
        repo,
        revision,
        reference=reference,
        offline=offline,
        allow_pickle=allow_pickle,
        headers_only=headers_only,
        endpoint=endpoint,
    )


def _expanded(reference: str) -> Path:
    if not reference.strip() or "\0" in reference:
        raise SourceError(f"{reference!r} is not the name of a model: a folder, or org/name")
    try:
        return Path(reference).expanduser()
    except RuntimeError as error:
        raise SourceError(f"{reference}: {error}") from error


def _a_file(reference: str, path: Path) -> SourceError:
    if path.suffix == ".safetensors":
        return SourceError(
            f"{reference}: a single file is not a checkpoint yet: put it in a folder with its "
            "config.json and name the folder"
        )
    return SourceError(f"{reference}: is a file, not a checkpoint's folder: name the folder")


def _hub_id(reference: str, revision: str | None) -> tuple[str, str | None]:
    match = HUB_ID.fullmatch(reference)
    if not match or ".." in reference or "--" in match["repo"]:
        raise SourceError(
            f"{reference}: no such folder, and a model on the hub is written org/name"
        )
    if match["revision"] and revision is not None:
        raise SourceError(f"{reference}: names a revision, and {revision!r} was asked for as well")
    return match["repo"], match["revision"] or revision
