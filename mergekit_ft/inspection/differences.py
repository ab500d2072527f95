"""In what two checkpoints differ, from their headers and side files alone."""

from __future__ import annotations

import filecmp
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.tokens.vocabulary import FILES, Vocabulary, files_of, read_vocabulary

PARTS = ("names", "shapes", "dtypes", "layout", "config", "tokenizer", "files")
CONFIG = "config.json"
Rows = list[dict[str, Any]]
SHOWN = 5  # tokens named
Side = Path | bytes


def differences(a: Source, b: Source, names: Collection[str]) -> dict[str, Rows]:
    """Return the differences by part; of tensors only those of these names."""
    mine, theirs = ({n: s[n] for n in s if n in names} for s in (a, b))
    both = [name for name in mine if name in theirs]
    tokenizer, files = _sides(a, b)
    return {
        "names": _names(a, b, mine, theirs),
        "shapes": [
            _two(n, list(a[n].shape), list(b[n].shape)) for n in _other(both, a, b, "shape")
        ],
        "dtypes": [_two(n, a[n].dtype, b[n].dtype) for n in _other(both, a, b, "dtype")],
        "layout": list(_layout(a, b, both)),
        "config": list(_config(a, b)),
        "tokenizer": tokenizer,
        "files": files,
    }


def _two(name: str, a: Any, b: Any) -> dict[str, Any]:
    return {"name": name, "a": a, "b": b}


def _other(names: Sequence[str], a: Source, b: Source, what: str) -> Iterator[str]:
    return (name for name in names if getattr(a[name], what) != getattr(b[name], what))


def _names(a: Source, b: Source, mine: Infos, theirs: Infos) -> Rows:
    """Return the tensors that one of the two lacks, and what they may be called in the other."""
    lost = {name: info for name, info in mine.items() if name not in b}
    new = {name: info for name, info in theirs.items() if name not in a}
    renamed = renames(lost, new)
    back = {there: here for here, there in renamed.items()}
    found = [_lone("A", info, b.ties.get(name), renamed.get(name)) for name, info in lost.items()]
    return found + [
        _lone("B", info, a.ties.get(name), back.get(name)) for name, info in new.items()
    ]


def _lone(where: str, info: TensorInfo, tied: str | None, other: str | None) -> dict[str, Any]:
    known = {"name": info.name, "only_in": where, "dtype": info.dtype, "shape": list(info.shape)}
    return known | ({"tied_to": tied} if tied else {}) | ({"renamed": other} if other else {})


Infos = Mapping[str, TensorInfo]
Key = tuple[Any, ...]


def renames(lost: Infos, new: Infos) -> dict[str, str]:
    """Return which tensors may have been renamed: of one dtype and shape, and partly of one name.

    Names are compared by how many segments they end (then begin) with alike; only what has one
    counterpart is named.
    """
    found: dict[str, str] = {}
    longest = max((name.count(".") + 1 for name in (*lost, *new)), default=0)
    for tail in (True, False):
        for count in range(longest, 1, -1):
            here = _by_part(lost, count, tail, found)
            there = _by_part(new, count, tail, found.values())
            for key in here.keys() & there.keys():
                if len(here[key]) == 1 and len(there[key]) == 1:
                    found[here[key][0]] = there[key][0]
    return found


def _by_part(infos: Infos, count: int, tail: bool, done: Collection[str]) -> dict[Key, list[str]]:
    """Return names by the last, or first, segments of theirs."""
    found: dict[Key, list[str]] = defaultdict(list)
    taken = set(done)
    for name, info in infos.items():
        segments = name.split(".")
        if name not in taken and len(segments) >= count:
            part = segments[-count:] if tail else segments[:count]
            found[(*part, info.dtype, info.shape)].append(name)
    return found


def _layout(a: Source, b: Source, both: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield in what the weight files differ but for what they hold."""
    mine, theirs = ([file.name for file in s.files] for s in (a, b))
    if mine != theirs:
        yield {"what": "weight files", "a": mine, "b": theirs}
    moved = [name for name in both if a[name].file != b[name].file]
    if moved and mine == theirs:
        yield {"what": "tensors in another file", "count": len(moved), "first": moved[0]}
    if (a.index is None) != (b.index is None):
        yield {"what": "index", "a": a.index is not None, "b": b.index is not None}
    held = {file.name: file for file in b.files}
    for file in a.files:
        if file.name in held:
            yield from _within(file, held[file.name])


def _within(mine: Any, theirs: Any) -> Iterator[dict[str, Any]]:
    """Yield in what one file differs: the order of what both hold, and its metadata."""
    order, other = ([info.name for info in file.tensors] for file in (mine, theirs))
    if order != other and sorted(order) == sorted(other):
        yield {"what": "order of tensors", "file": mine.name}
    if mine.metadata != theirs.metadata:
        yield {"what": "metadata", "file": mine.name, "a": mine.metadata, "b": theirs.metadata}


_ABSENT = object()


def _config(a: Source, b: Source) -> Iterator[dict[str, Any]]:
    """Yield the keys of config.json that differ; one that a model lacks is not named for it."""
    mine, theirs = dict(_flat(a.config)), dict(_flat(b.config))
    for key in dict.fromkeys([*mine, *theirs]):
        one, other = mine.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if _text(one) != _text(other):
            row = {"name": key, "a": one, "b": other}
            yield {word: value for word, value in row.items() if value is not _ABSENT}


def _text(value: Any) -> str | None:
    """Return a value so that 1, 1.0 and true differ, as they do in the file."""
    return None if value is _ABSENT else json.dumps(value, sort_keys=True)


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _sides(a: Source, b: Source) -> tuple[Rows, Rows]:
    """Return the side files that differ: the tokenizer's, and the others."""
    mine, theirs = _side_files(a), _side_files(b)
    rows = [row for name in sorted({*mine, *theirs}) if (row := _side(name, mine, theirs))]
    tokenizer = [row for row in rows if FILES.fullmatch(row["name"])]
    others = [row for row in rows if not FILES.fullmatch(row["name"])]
    return tokenizer + (list(_vocabularies(a, b)) if tokenizer else []), others


def _side_files(source: Source) -> dict[str, Side]:
    """Return the side files as they would come out, config.json apart."""
    found: dict[str, Side] = {}
    if source.folder is not None:
        for path in (*source.side_files(), *source.code_files()):
            found[path.as_posix()] = source.folder / path
    for name, by in source.around.replaced.items():
        found.pop(name, None)
        if by is not None:
            found[name] = by
    return {name: file for name, file in found.items() if name != CONFIG}


def _side(name: str, mine: Mapping[str, Side], theirs: Mapping[str, Side]) -> dict[str, Any] | None:
    if name not in mine or name not in theirs:
        return {"name": name, "only_in": "A" if name in mine else "B"}
    same = _same(mine[name], theirs[name])
    if same is None:
        return {"name": name, "unread": True}
    return None if same else {"name": name, "differs": True}


def _same(one: Side, other: Side) -> bool | None:
    """Compare two files; None where one was not fetched."""
    if isinstance(one, Path) and isinstance(other, Path):
        if not (one.is_file() and other.is_file()):
            return None
        try:
            return filecmp.cmp(one, other, shallow=False)
        except OSError as error:
            raise SourceError(f"{one} or {other}: cannot be read: {error.strerror}") from error
    held = [file if isinstance(file, bytes) else file.read_bytes() for file in (one, other)]
    return held[0] == held[1]


def _vocabularies(a: Source, b: Source) -> Iterator[dict[str, Any]]:
    """Yield what two tokenizers make of their tokens, where their files differ."""
    read = [_vocabulary(source) for source in (a, b)]
    for where, vocabulary in zip("AB", read, strict=True):
        if isinstance(vocabulary, str):
            yield {"what": "unreadable", "in": where, "why": vocabulary}
    one, other = read
    if not isinstance(one, Vocabulary) or not isinstance(other, Vocabulary):
        return
    for what, tokens in (
        ("tokens only in A", [t for t in one.ids if t not in other.ids]),
        ("tokens only in B", [t for t in other.ids if t not in one.ids]),
        (
            "tokens of another id",
            [t for t in one.ids if other.ids.get(t, one.ids[t]) != one.ids[t]],
        ),
    ):
        if tokens:
            yield {"what": what, "count": len(tokens), "first": tokens[:SHOWN]}


def _vocabulary(source: Source) -> Vocabulary | str | None:
    """Return a model's vocabulary, or why it cannot be read."""
    try:
        return read_vocabulary(files_of(source), source.reference)
    except SourceError as error:
        return str(error)
