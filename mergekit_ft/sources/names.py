"""A model brought to another's names and layout: by a change of prefix, expert by expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import places
from mergekit_ft.sources.experts import Experts, experts, seat
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.pieces import Runs, pieced, whole
from mergekit_ft.sources.source import Source

Prefixes = Mapping[str, str]  # how names begin -> how they begin in the other model
MIXTURE = re.compile(r"\.(block_sparse_moe|mlp)(?=\.(?:experts|gate)\.)")  # one module, two names
SHOWN = 4  # maps in a message


def brought(source: Source, donor: Source, prefixes: Prefixes | None = None) -> Source:
    """Return a source under the donor's names and in its layout; itself where it has them.

    A change of prefix is found where only one brings every tensor of one model onto one of the
    other's; `prefixes` says it instead.
    """
    chosen = _found(source, donor) if prefixes is None else prefixes
    if prefixes is not None:
        _require_effect(source, donor, prefixes)
    named = _by_new_name(source, donor, chosen)
    held = experts(source.reference, named)
    theirs = experts(donor.reference, {name: donor[name] for name in donor})
    made = dict(_made(donor, named, held, theirs))
    as_it_is = all(name == info.name for name, info in named.items())
    if as_it_is and all(info.name in source for info in made):
        return source
    return _view(source, named, made, chosen)


def _view(
    source: Source, named: Mapping[str, TensorInfo], made: Mapping[TensorInfo, Runs], by: Prefixes
) -> Source:
    used = {run.name for runs in made.values() for run in runs}
    rest = [  # of no use to the donor, and named so
        (replace(info, name=name), whole(info))
        for name, info in named.items()
        if info.name not in used
    ]
    new = {info.name: name for name, info in named.items()}
    ties = {_renamed(one, by, new): _renamed(to, by, new) for one, to in source.ties.items()}
    return pieced(source, [*made.items(), *rest], ties, _told(source, made, by))


def _told(source: Source, made: Mapping[TensorInfo, Runs], by: Prefixes) -> Iterator[str]:
    """Say what is read under another name, or in another layout."""
    for one, to in by.items():
        yield f"{source.reference}: its '{one}*' are read as '{to}*'"
    cut = sum(len(runs) == 1 and runs != whole(source[runs[0].name]) for runs in made.values())
    stacked = sum(len(runs) > 1 for runs in made.values())
    if cut:
        yield f"{source.reference}: {cut} experts are cut out of the tensors of whole layers"
    if stacked:
        yield f"{source.reference}: its experts are stacked into {stacked} tensors"


def _renamed(name: str, prefixes: Prefixes, known: Mapping[str, str]) -> str:
    return known.get(name) or substituted(name, prefixes)


def substituted(name: str, prefixes: Prefixes) -> str:
    """Return a name with the longest prefix that it begins with changed."""
    longest = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
    return name if longest is None else prefixes[longest] + name[len(longest) :]


def _by_new_name(source: Source, donor: Source, prefixes: Prefixes) -> dict[str, TensorInfo]:
    """Return the source's tensors under the names of the donor's modules."""
    modules = {match[1] for name in donor for match in MIXTURE.finditer(name)}
    named: dict[str, TensorInfo] = {}
    for info in source.values():
        name = substituted(info.name, prefixes)
        if len(modules) == 1 and name not in donor:
            name = MIXTURE.sub("." + next(iter(modules)), name)
        if name in named:
            raise SourceError(
                f"{source.reference}: {named[name].name} and {info.name} would both be {name}"
            )
        named[name] = info
    return named


def _made(
    donor: Source, named: Mapping[str, TensorInfo], held: Experts, theirs: Experts
) -> Iterator[tuple[TensorInfo, Runs]]:
    """Yield each of the donor's tensors that the source has, or has the parts of."""
    for wanted in donor.values():
        own = named.get(wanted.name)
        if own is not None:
            yield replace(own, name=wanted.name), whole(own)
            continue
        at = seat(wanted.name, wanted.shape)
        if at is not None:
            count = wanted.shape[0] if at.expert is None else theirs.count(at)
            found = held.runs(wanted, at, count)
            if found is not None:
                yield found


def _require_effect(source: Source, donor: Source, prefixes: Prefixes) -> None:
    for prefix, to in prefixes.items():
        if not any(name.startswith(prefix) for name in source):
            raise SourceError(
                f"{source.reference}: prefix '{prefix}' begins no tensor's name{_like(source)}"
            )
        if not any(name.startswith(to) for name in donor):
            raise SourceError(
                f"{donor.reference}: prefix '{to}' begins no tensor's name{_like(donor)}"
            )


def _like(source: Source) -> str:
    return f"; names are like {', '.join(list(source)[:2])}"


def _found(source: Source, donor: Source) -> Prefixes:
    """Return the one change of prefix that explains the names; {} where none is called for."""
    mine, theirs = _keys(source), _keys(donor)
    inner = {key for key in mine if places([key])[key].layer is not None}
    if not inner or inner & theirs.keys():
        return {}
    maps: dict[tuple[str, ...], dict[str, str]] = {}
    for prefix, to in _candidates(min(inner), theirs):
        landed = {key: substituted(key, {prefix: to}) for key in mine}
        if _explains(landed, mine, theirs, donor):
            maps.setdefault(tuple(landed.values()), {prefix: to})
    if len(maps) > 1:
        said = "; ".join(_said(found) for found in list(maps.values())[:SHOWN])
        raise SourceError(
            f"{source.reference}: its tensors could be several parts of {donor.reference}; choose "
            f"one by `prefix:` beside the model ({said})"
        )
    return next(iter(maps.values()), {})


def _said(prefixes: Prefixes) -> str:
    return ", ".join(f"prefix: {{'{one}': '{to}'}}" for one, to in prefixes.items())


def _keys(source: Source) -> dict[str, tuple[int, ...]]:
    """Return names and shapes, an expert's under its layer's: they may be in another layout."""
    found: dict[str, tuple[int, ...]] = {}
    for info in source.values():
        at = seat(info.name, info.shape)
        key = MIXTURE.sub(".mlp", info.name if at is None else at.stem + ".")
        found[key] = info.shape if at is None else ()
    return found


def _candidates(anchor: str, theirs: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the changes of prefix that bring one tensor onto another."""
    parts = anchor.split(".")
    last = next(i for i, part in enumerate(parts) if part.isdigit())
    for i in range(last):
        prefix, rest = "".join(f"{part}." for part in parts[:i]), ".".join(parts[i:])
        for name in theirs:
            if name == rest or name.endswith("." + rest):
                yield prefix, name[: len(name) - len(rest)]


def _explains(
    landed: Mapping[str, str],
    mine: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
    donor: Source,
) -> bool:
    """Say whether every tensor of one model lands on one of the other's, in its shape."""
    at = [(key, to if to in theirs else donor.ties.get(to, to)) for key, to in landed.items()]
    pairs = [(key, to) for key, to in at if to in theirs]
    if not all(_alike(mine[key], theirs[to], to) for key, to in pairs):
        return False
    return len(pairs) == len(mine) or {to for _, to in pairs} == theirs.keys()


def _alike(one: Sequence[int], other: Sequence[int], name: str) -> bool:
    """Compare shapes; those of a vocabulary may differ in their rows, which is another matter."""
    role = places([name])[name].role
    return one == other or (role in ("embedding", "head") and one[1:] == other[1:])
