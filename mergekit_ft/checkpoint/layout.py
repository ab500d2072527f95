"""Which files the output has, and which tensors lie in each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_ft.writer import Entry, OutFile

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution

METADATA = {"format": "pt"}  # what readers expect of a file that says nothing
SINGLE = "model.safetensors"
USUAL_SHARD = 5 * 1000**3  # bytes, where the donor's files cannot be kept
UNITS = {
    "": 1,
    **{letter + "B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{letter + "iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
UNITS |= {letter: UNITS[letter + "B"] for letter in "KMGT"} | {"B": 1}
_UNIT_OF = {unit.lower(): factor for unit, factor in UNITS.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Return a number of bytes; ValueError names the forms it may have."""
    match = _SIZE.fullmatch(text.strip())
    factor = _UNIT_OF.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{text!r} is not a size: write bytes (300000) or a number with a unit, KB MB GB TB "
            "(powers of 1000) or KiB MiB GiB TiB (powers of 1024), such as 500MB, 1.5G or 1GiB"
        )
    whole, _, part = match[1].partition(".")
    size: int = int((whole or "0") + part) * factor // 10 ** len(part)
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return size


def out_files(resolution: Resolution, max_shard_size: int | None) -> list[OutFile]:
    """Return the files of the output: the donor's, or shards of at most so many bytes.

    A stack has other tensors than the donor, so it gets shards as large as the donor's largest.
    """
    entries = {task.name: Entry(task.name, task.dtype, task.shape) for task in resolution.tasks}
    if resolution.stack is not None:
        held = resolution.donor.files
        whole = OutFile(SINGLE, tuple(entries.values()), held[0].metadata or METADATA)
        usual = max(USUAL_SHARD, *(sum(info.nbytes for info in file.tensors) for file in held))
        return _sharded([whole], max_shard_size or usual)
    files = [
        OutFile(
            file.name,
            tuple(entries[info.name] for info in file.tensors),
            file.metadata or METADATA,
        )
        for file in resolution.donor.files
    ]
    return files if max_shard_size is None else _sharded(files, max_shard_size)


def index_json(resolution: Resolution, files: Sequence[OutFile]) -> dict[str, Any] | None:
    """Return what the index says; None where the output needs none."""
    donated = resolution.donor.index
    place = {entry.name: file.name for file in files for entry in file.entries}
    if len(files) == 1 and (donated is None or place != donated["weight_map"]):
        return None
    index = dict(donated or {})
    metadata = index.get("metadata")
    total = sum(entry.nbytes for file in files for entry in file.entries)
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    order = [name for name in index.get("weight_map", ()) if name in place]
    index["weight_map"] = {name: place[name] for name in [*order, *place]}
    return index


def _sharded(files: Sequence[OutFile], limit: int) -> list[OutFile]:
    """Fill shards in the donor's order; a tensor above the limit has one to itself."""
    shards = list(_filled((entry for file in files for entry in file.entries), limit))
    metadata, total = files[0].metadata, len(shards)
    if total == 1:
        return [OutFile(SINGLE, shards[0], metadata)]
    return [
        OutFile(f"model-{number:05}-of-{total:05}.safetensors", shard, metadata)
        for number, shard in enumerate(shards, 1)
    ]


def _filled(entries: Iterable[Entry], limit: int) -> Iterable[tuple[Entry, ...]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.nbytes > limit:
            yield tuple(shard)
            shard, size = [], 0
        shard.append(entry)
        size += entry.nbytes
    yield tuple(shard)
