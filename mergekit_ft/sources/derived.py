"""Sources made of other sources: other tensors over the same surroundings, read on demand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mergekit_ft.sources.edits import with_edits
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import SourceFile, TensorInfo
from mergekit_ft.sources.source import Source


def derived(
    source: Source,
    tensors: Iterable[TensorInfo],
    reader: Reader,
    *,
    reference: str | None = None,
    inputs: Mapping[str, SourceFile] | None = None,
    edits: Mapping[str, Any] | None = None,
    origins: Iterable[Source] | None = None,
    notes: Iterable[str] = (),
    conflicts: Iterable[str] = (),
) -> Source:
    """Return a source of other tensors; each lies, in name, in the file that its info says.

    `inputs` are more files on disk that the bytes come from; `edits` are of its config.json;
    `origins` are the sources to name in its place where what was read is told; `notes` say what a
    user should know of how the tensors are read, `conflicts` in what it differs from the donor.
    """
    by_file: dict[str, list[TensorInfo]] = {file.name: [] for file in source.files}
    for info in tensors:
        by_file.setdefault(info.file, []).append(info)
    known = {file.name: file for file in source.files}
    files = tuple(
        replace(known.get(name, source.files[0]), name=name, tensors=tuple(held))
        for name, held in by_file.items()
        if held
    )
    around = replace(
        source.around,
        config=with_edits(source.config, edits or {}),
        edits={**source.edits, **(edits or {})},
        notes=(*source.notes, *notes),
        conflicts=(*source.around.conflicts, *conflicts),
    )
    made = Source(
        source.reference if reference is None else reference,
        files,
        reader,
        around,
        source.revision,
        {**source.inputs, **(inputs or {})},
    )
    made.origins = source.origins if origins is None else tuple(origins)
    made.on_disk = source.on_disk
    made.adapter = source.adapter if origins is None else None
    made.delta = source.delta if origins is None else None
    return made
