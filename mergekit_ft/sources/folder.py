"""A local folder as a source."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.files import FileReader, Reader, sha256_of_blob
from mergekit_ft.sources.header import SourceFile, read_file
from mergekit_ft.sources.layout import (
    PICKLE,
    SAFE,
    Fetch,
    Layout,
    check_index,
    find,
    read_json,
    weight_names,
)
from mergekit_ft.sources.quantised import readable
from mergekit_ft.sources.refusals import refuse_no_weights
from mergekit_ft.sources.sides import WEIGHTS, side_files, walk
from mergekit_ft.sources.source import Around, Source


def open_folder(
    folder: Path, reference: str, *, allow_pickle: bool = False, revision: str | None = None
) -> Source:
    """Open the checkpoint in a folder."""
    names = walk(folder)
    config = config_of(names, lambda name: content(folder, name), str(folder))
    layout = choose(names, lambda name: content(folder, name), str(folder), allow_pickle)
    others = unread(names, layout)
    files, reader, layout = _opened(folder, layout, config)
    sides = side_files(names, lambda name: content(folder, name))
    around = Around(folder, layout.index, config, sides, others)
    return readable(Source(reference, files, reader, around, revision))


def content(folder: Path, name: str) -> bytes:
    """Return the bytes of a small file in a folder."""
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise SourceError(f"{folder / name}: cannot be read: {error.strerror or error}") from error


def config_of(names: Collection[str], fetch: Fetch, where: str) -> dict[str, Any]:
    """Return config.json as read, {} without one."""
    if "config.json" not in names:
        return {}
    return read_json(fetch("config.json"), f"{where}/config.json")


def choose(names: Collection[str], fetch: Fetch, where: str, allow_pickle: bool) -> Layout:
    """Choose the weight files, safetensors before pickles, or say why there are none."""
    layout = find(names, fetch, where, SAFE)
    if layout is None and weight_names(names, PICKLE):
        if not allow_pickle:
            raise SourceError(
                f"{where}: its weights are pickles ({weight_names(names, PICKLE)[0]}), which can "
                "run code when loaded: convert them (from_pretrained, save_pretrained), or pass "
                "--allow-pickle to read tensors from them and nothing else"
            )
        layout = find(names, fetch, where, PICKLE)
    if layout is None:
        base = None
        if "adapter_config.json" in names:
            adapter = read_json(fetch("adapter_config.json"), f"{where}/adapter_config.json")
            base = adapter.get("base_model_name_or_path")
        raise refuse_no_weights(where, names, base)
    return layout


def unread(names: Collection[str], layout: Layout) -> tuple[str, ...]:
    """Return the weight files beside the chosen ones, in whatever format."""
    held = {name for name in names if name.endswith(WEIGHTS) and "/" not in name}
    indices = {name for name in held if name.endswith(".index.json")}
    return tuple(sorted(held - indices - set(layout.files)))


def _opened(
    folder: Path, layout: Layout, config: dict[str, Any]
) -> tuple[tuple[SourceFile, ...], Reader, Layout]:
    if layout.pickled:
        from mergekit_ft.sources.pickles import open_pickles

        return open_pickles(folder, layout, config)
    files = tuple(
        replace(read_file(folder / name, name), sha256=sha256_of_blob(folder / name))
        for name in layout.files
    )
    held = {file.name: {info.name for info in file.tensors} for file in files}
    check_index(layout, held, str(folder))
    return files, FileReader(files), layout
