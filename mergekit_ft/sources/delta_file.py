"""A delta file: what one small file changes in a model. `docs/delta-format.md` is its definition.

It is a safetensors file whose metadata says what becomes of each tensor and of which bytes; the
header alone tells whether the file agrees with itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.dtypes import FLOATING, SIZE
from mergekit_ft.sources.files import FileReader
from mergekit_ft.sources.header import SourceFile, TensorInfo, read_file
from mergekit_ft.sources.layout import listed

FORMAT, WORDS = "mergekit-ft delta", "delta"  # of `__metadata__`: its format, and our JSON
VERSION = 1
CODINGS = {"int32": "I32", "int64": "I64", "gap16": "I16"}  # of indices: the dtype stored
PARTS: dict[str, tuple[set[str], set[str]]] = {  # of each kind: what it needs, what it may have
    "replace": ({"indices", "values", "originals"}, set()),
    "add": ({"indices", "values"}, set()),
    "dense": ({"values"}, {"originals"}),
    "low_rank": ({"a", "b"}, set()),
    "mask": ({"unified", "masks"}, set()),
}
SPARSE = ("replace", "add")
KEYS = {"version", "base", "method", "parameters", "density", "seed", "provenance", "tensors"}
OPTIONAL = {"tasks", "scales"}  # of packs
OF_TENSOR = {"kind", "dtype", "shape", "sha256", "entries", "coding", "scale"}
HEXADECIMAL = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor."""

    name: str
    kind: str  # a key of PARTS
    dtype: str  # of the model's tensor, as a code of safetensors
    shape: tuple[int, ...]  # of the model's tensor, as it becomes
    sha256: str | None  # of the base tensor's bytes; None where the base has none
    entries: int  # that may change
    coding: str | None  # of the indices; None where there are none
    scale: float  # of the product of a low-rank change
    parts: Mapping[str, TensorInfo]  # where they lie in the file

    @property
    def numel(self) -> int:
        """Return the elements of the tensor as it becomes."""
        return prod(self.shape)

    @property
    def exact(self) -> bool:
        """Say whether the base's bytes can be had back from the changed ones."""
        return "originals" in self.parts


@dataclass(frozen=True)
class DeltaFile:
    """A delta file, opened: its header was checked, and none of its values were read."""

    reference: str  # as the user names it
    path: Path
    words: Mapping[str, Any]  # the JSON of its metadata
    changes: Mapping[str, Change]  # by the model's names
    reader: FileReader
    file: SourceFile
    tasks: tuple[str, ...] = ()  # of a pack

    @property
    def base(self) -> str:
        """Return the model that it was made for, as its maker named it."""
        made_for = self.words["base"]
        revision = f"@{made_for['revision']}" if made_for.get("revision") else ""
        return f"{made_for.get('id') or 'a model without a name'}{revision}"

    def close(self) -> None:
        """Give back what is held open."""
        self.reader.close()


@dataclass
class _Faults:
    """What is wrong with one file, told at once."""

    where: str
    found: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        self.found.append(fault)

    def raise_any(self) -> None:
        if self.found:
            more = f"; and {len(self.found) - 5} more" if len(self.found) > 5 else ""
            raise SourceError(f"{self.where}: {'; '.join(self.found[:5])}{more}")


def is_delta(path: Path) -> bool:
    """Say whether a file calls itself a delta; a file that cannot be read does not."""
    try:
        return read_file(path, path.name).metadata.get("format") == FORMAT
    except SourceError:
        return False


def open_delta(path: Path, reference: str | None = None) -> DeltaFile:
    """Open a delta file and check all that its header can tell."""
    named = str(path) if reference is None else reference
    file = read_file(path, path.name)
    words = _words(file, named)
    infos = {info.name: info for info in file.tensors}
    faults = _Faults(named)
    changes = {}
    for name, record in words["tensors"].items():
        parts = _claimed(name, infos)
        change = _change(name, record, parts, faults)
        if change is not None:
            changes[name] = change
    if infos:
        faults.add(f"{len(infos)} of its tensors have no record: {listed(list(infos))}")
    tasks = tuple(words.get("tasks", ()))
    _require_tasks(changes, tasks, faults)
    faults.raise_any()
    return DeltaFile(named, path, words, changes, FileReader((file,)), file, tasks)


def _words(file: SourceFile, where: str) -> dict[str, Any]:
    if file.metadata.get("format") != FORMAT or WORDS not in file.metadata:
        raise SourceError(
            f"{where}: is no delta file: its metadata does not say `format: {FORMAT}`; "
            "`mergekit-ft delta extract` makes one, `delta convert` makes one of other formats"
        )
    try:
        words = json.loads(file.metadata[WORDS], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: its metadata cannot be read as JSON: {error}") from None
    if not isinstance(words, dict) or not isinstance(words.get("version"), int):
        raise SourceError(f"{where}: its metadata says no version of the format")
    if words["version"] != VERSION:
        raise SourceError(
            f"{where}: is a delta file of version {words['version']}, and this mergekit-ft reads "
            f"version {VERSION}: take the mergekit-ft that wrote it, or a newer one"
        )
    _check_words(words, where)
    return words


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a key that stands twice would hide a change."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _check_words(words: dict[str, Any], where: str) -> None:
    faults = _Faults(where)
    for key in sorted(KEYS - words.keys()):
        faults.add(f"its metadata lacks `{key}`")
    for key in sorted(words.keys() - KEYS - OPTIONAL):
        faults.add(f"its metadata has `{key}`, which version {VERSION} does not know")
    for key in ("base", "tensors", "parameters", "provenance"):
        if not isinstance(words.get(key, {}), dict):
            faults.add(f"its `{key}` is no object")
    faults.raise_any()
    if not words["tensors"]:
        faults.add("it changes no tensor")
    tasks, scales = words.get("tasks", []), words.get("scales", [])
    if not _texts(tasks) or len(set(tasks)) != len(tasks) or not _numbers(scales):
        faults.add("its `tasks` must be different names, and its `scales` numbers")
    elif len(tasks) != len(scales):
        faults.add(f"it names {len(tasks)} tasks and {len(scales)} scales")
    faults.raise_any()


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value for value in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    """Say whether a value is a finite number; Python's JSON takes NaN, and integers of any size."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _claimed(name: str, infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Take out of the file's tensors those that are parts of one change."""
    words = {word for needed, possible in PARTS.values() for word in needed | possible}
    return {word: infos.pop(f"{name}:{word}") for word in words if f"{name}:{word}" in infos}


def _change(name: str, record: Any, parts: dict[str, TensorInfo], faults: _Faults) -> Change | None:
    """Return a change whose record and parts agree, or None after telling why they do not."""
    wrong = list(_of_record(record))
    if wrong:
        faults.add(f"{name}: {'; '.join(wrong)}")
        return None
    change = Change(
        name,
        record["kind"],
        record["dtype"],
        tuple(record["shape"]),
        record["sha256"],
        record["entries"],
        record["coding"],
        float(record["scale"]),
        parts,
    )
    needed, possible = PARTS[change.kind]
    if needed - parts.keys() or parts.keys() - needed - possible:
        faults.add(
            f"{name}: a change of kind {change.kind} has {', '.join(sorted(needed))}, this one "
            f"{', '.join(sorted(parts)) or 'nothing'}"
        )
        return None
    for fault in _of_parts(change):
        faults.add(f"{name}: {fault}")
    return change


def _of_record(record: Any) -> Iterator[str]:
    """Yield what is wrong with what the metadata says of a tensor."""
    if not isinstance(record, dict) or record.keys() != OF_TENSOR:
        yield f"its record needs {', '.join(sorted(OF_TENSOR))}, and no more"
        return
    kind, coding, shape = record["kind"], record["coding"], record["shape"]
    if kind not in PARTS:
        yield f"a change of kind {kind!r} is not known; the kinds are {', '.join(PARTS)}"
        return
    if record["dtype"] not in SIZE:
        yield f"dtype {record['dtype']!r} is not known"
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        yield "its shape is no list of whole numbers"
    if type(record["entries"]) is not int or record["entries"] < 0:
        yield "its entries are no whole number"
    if (kind in SPARSE) != (coding in CODINGS):
        yield f"a change of kind {kind} cannot have indices coded as {coding!r}"
    sha256 = record["sha256"]
    if sha256 is not None and not (isinstance(sha256, str) and HEXADECIMAL.fullmatch(sha256)):
        yield "its sha256 is no SHA-256 in hexadecimal"
    if not _is_number(record["scale"]):
        yield "its scale is no number"


def _of_parts(change: Change) -> Iterator[str]:
    """Yield in what the parts do not agree with the record."""
    yield from _CHECKS[change.kind](change)


def _of_sparse(change: Change) -> Iterator[str]:
    indices, values = change.parts["indices"], change.parts["values"]
    assert change.coding is not None
    if indices.dtype != CODINGS[change.coding] or len(indices.shape) != 1:
        yield f"indices coded as {change.coding} are flat {CODINGS[change.coding]}"
    if change.coding != "gap16" and indices.numel != change.entries:
        yield f"{indices.numel} indices, where the record says {change.entries} entries"
    if change.entries > change.numel or change.entries > indices.numel:
        yield f"{change.entries} entries in a tensor of {change.numel}, {indices.numel} codes"
    yield from _alike(change, ("values", "originals"), (change.entries,))
    if change.kind == "replace" and values.dtype != change.dtype:
        yield f"values of {values.dtype} replace entries of {change.dtype}"
    if change.kind == "add" and not {values.dtype, change.dtype} <= FLOATING:
        yield f"values of {values.dtype} cannot be added to {change.dtype}"
    if change.sha256 is None:
        yield "entries change, and the SHA-256 of the base tensor is not recorded"


def _of_dense(change: Change) -> Iterator[str]:
    values = change.parts["values"]
    if (values.dtype, values.shape) != (change.dtype, change.shape):
        yield f"its values are {values.dtype} {list(values.shape)}"
    if change.exact and change.sha256 is None:
        yield "it has originals, and the SHA-256 of the base tensor is not recorded"


def _of_low_rank(change: Change) -> Iterator[str]:
    a, b = change.parts["a"], change.parts["b"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        yield f"factors of shape {list(b.shape)} and {list(a.shape)} have no product"
    elif (b.shape[0], a.shape[1]) != change.shape:
        yield f"b @ a is {[b.shape[0], a.shape[1]]}, the tensor {list(change.shape)}"
    if not {a.dtype, b.dtype, change.dtype} <= FLOATING:
        yield f"factors of {b.dtype} and {a.dtype} cannot be added to {change.dtype}"


def _of_mask(change: Change) -> Iterator[str]:
    unified, masks = change.parts["unified"], change.parts["masks"]
    if unified.shape != (change.numel,) or unified.dtype not in FLOATING:
        yield f"its unified vector is {unified.dtype} {list(unified.shape)}"
    if masks.dtype != "U8" or len(masks.shape) != 2:
        yield f"its masks are {masks.dtype} {list(masks.shape)}, not rows of bytes"
    if change.dtype not in FLOATING:
        yield f"a vector of {unified.dtype} cannot be added to {change.dtype}"
    if change.entries != change.numel:
        yield f"{change.entries} entries are recorded, and its masks are of {change.numel}"
    if change.sha256 is None:
        yield "its tasks change it, and the SHA-256 of the base tensor is not recorded"


def _require_tasks(changes: Mapping[str, Change], tasks: Sequence[str], faults: _Faults) -> None:
    """Tell where tasks and masks do not agree: each has the other, a row of bits for each task."""
    packed = [change for change in changes.values() if change.kind == "mask"]
    if bool(packed) != bool(tasks):
        have = "it has masks, and names no tasks" if packed else "it names tasks, and has no masks"
        faults.add(have)
        return
    for change in packed:
        wanted, found = (len(tasks), (change.numel + 7) // 8), change.parts["masks"].shape
        if found != wanted:
            faults.add(
                f"{change.name}: masks of shape {list(found)}, where {len(tasks)} tasks of "
                f"{change.numel} bits need {list(wanted)}"
            )


def _alike(change: Change, words: Iterable[str], shape: tuple[int, ...]) -> Iterator[str]:
    for word in words:
        part = change.parts.get(word)
        if part is not None and part.shape != shape:
            yield f"its {word} are {list(part.shape)}, where the record says {list(shape)}"
    both = [change.parts[word].dtype for word in words if word in change.parts]
    if len(set(both)) > 1:
        yield f"its values are {both[0]} and its originals {both[1]}"


_CHECKS = {
    "replace": _of_sparse,
    "add": _of_sparse,
    "dense": _of_dense,
    "low_rank": _of_low_rank,
    "mask": _of_mask,
}
