"""A single file of tensors as a source: no config, no tokenizer, nothing around it."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.files import FileReader, Reader
from mergekit_ft.sources.header import SourceFile, read_file
from mergekit_ft.sources.layout import PICKLE, SAFE, SHARD, Layout
from mergekit_ft.sources.quantised import readable
from mergekit_ft.sources.source import Around, Source

ADAPTER = re.compile(r"(?:.*\.)?(?:lora_[AB]|lora_embedding_[AB])(?:\..*)?")


def open_raw(path: Path, reference: str, *, allow_pickle: bool = False) -> Source:
    """Open one file; in the output its tensors lie in model.safetensors."""
    _refuse_shard(path, reference)
    files, reader = _opened(path, reference, allow_pickle)
    source = Source(reference, files, reader, Around())
    _refuse_adapter(source)
    return readable(source)


def _opened(
    path: Path, reference: str, allow_pickle: bool
) -> tuple[tuple[SourceFile, ...], Reader]:
    if path.name.endswith(SAFE.suffixes):
        found = (read_file(path, SAFE.single),)
        return found, FileReader(found)
    if not path.name.endswith(PICKLE.suffixes):
        kinds = ", ".join((*SAFE.suffixes, *PICKLE.suffixes))
        raise SourceError(
            f"{reference}: is a file that holds no tensors by its name ({kinds}): name the "
            "checkpoint's folder, or a file of tensors"
        )
    if not allow_pickle:
        raise SourceError(
            f"{reference}: is a pickle, which can run code when loaded: save it as safetensors, or "
            "pass --allow-pickle to read tensors from it and nothing else"
        )
    from mergekit_ft.sources.pickles import open_pickles

    files, reader, _ = open_pickles(path.parent, Layout((path.name,), None, True), {})
    return files, reader


def _refuse_shard(path: Path, reference: str) -> None:
    match = SHARD.fullmatch(path.name)
    if match and int(match["total"]) > 1:
        raise SourceError(
            f"{reference}: is one shard of {int(match['total'])}, a part of a model: name the "
            f"folder, {path.parent}"
        )


def _refuse_adapter(source: Source) -> None:
    held = next((name for name in source if ADAPTER.fullmatch(name)), None)
    if held is not None:
        raise SourceError(
            f"{source.reference}: holds an adapter ({held}), whose factors do not merge one by "
            "one: name its folder as the adapter of a model"
        )
