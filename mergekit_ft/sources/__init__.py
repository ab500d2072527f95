"""Checkpoints opened lazily: a folder, a single file or a repo on the hub; adapters to put on."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.adapted import adapted
from mergekit_ft.sources.adapter import Adapter, open_adapter_folder
from mergekit_ft.sources.folder import open_folder
from mergekit_ft.sources.header import SourceFile, TensorInfo
from mergekit_ft.sources.raw import open_raw
from mergekit_ft.sources.source import Source

__all__ = [
    "Adapter",
    "Source",
    "SourceFile",
    "TensorInfo",
    "adapted",
    "open_adapter",
    "open_source",
]

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
    """Open a folder, a file of tensors, or `org/name` with an optional `@revision` on the hub."""
    path = _expanded(reference)
    if path.exists():
        if revision is not None:
            raise SourceError(
                f"{reference}: is local and has no revision ({revision!r} was asked for): leave it "
                "out"
            )
        opening = open_folder if path.is_dir() else open_raw
        return opening(path, reference, allow_pickle=allow_pickle)
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


def open_adapter(
    reference: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    allow_pickle: bool = False,
    endpoint: str | None = None,
) -> Adapter:
    """Open an adapter: a folder, or `org/name` on the hub; `adapted` puts it on a model."""
    path = _expanded(reference)
    if path.is_file():
        raise SourceError(f"{reference}: is a file, and an adapter is a folder: name the folder")
    if path.exists():
        if revision is not None:
            raise SourceError(
                f"{reference}: is local and has no revision ({revision!r} was asked for): leave it "
                "out"
            )
        return open_adapter_folder(path, reference, allow_pickle=allow_pickle)
    repo, revision = _hub_id(reference, revision)
    from mergekit_ft.sources.hub import fetch_adapter

    folder, commit = fetch_adapter(repo, revision, offline=offline, endpoint=endpoint)
    return open_adapter_folder(folder, reference, allow_pickle=allow_pickle, revision=commit)


def _expanded(reference: str) -> Path:
    if not reference.strip() or "\0" in reference:
        raise SourceError(f"{reference!r} is not the name of a model: a folder, or org/name")
    try:
        return Path(reference).expanduser()
    except RuntimeError as error:
        raise SourceError(f"{reference}: {error}") from error


def _hub_id(reference: str, revision: str | None) -> tuple[str, str | None]:
    match = HUB_ID.fullmatch(reference)
    if not match or ".." in reference or "--" in match["repo"]:
        raise SourceError(
            f"{reference}: no such folder, and a model on the hub is written org/name"
        )
    if match["revision"] and revision is not None:
        raise SourceError(f"{reference}: names a revision, and {revision!r} was asked for as well")
    return match["repo"], match["revision"] or revision
