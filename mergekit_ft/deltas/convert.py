"""convert(): deltas of other tools to delta files, and back; what was written is read again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mergekit_ft.deltas import composable, sara, shira
from mergekit_ft.deltas.landing import land, naming
from mergekit_ft.deltas.moves import Move, moves_of, require_same, require_sound
from mergekit_ft.errors import PlanError, SourceError, WriteError
from mergekit_ft.sources import open_source
from mergekit_ft.sources.delta_file import DeltaFile, open_delta
from mergekit_ft.sources.patched import require_base
from mergekit_ft.sources.source import Source

Format = Literal["composable-sft", "shira", "sara", "delta"]
Where = str | os.PathLike[str]


@dataclass(frozen=True)
class Converted:
    """What was written."""

    out: Path
    tensors: int
    entries: int  # that may change
    whole: int  # tensors that stand whole
    notes: tuple[str, ...] = ()


def convert(
    path: Where,
    out: Where,
    *,
    of: Format,
    to: Format,
    base: str | None = None,
    exact: bool = False,
    threshold: float | None = None,
    order: Where | None = None,
    overwrite: bool = False,
    offline: bool = False,
) -> Converted:
    """Write a delta in another format; to a delta file it takes the base, whose hashes it records.

    `exact` stores what comes out on the base, rounded once, and what was there, so that it comes
    off to the bit; else what is added. `threshold` and `order`, of names, are for SaRA's file.
    """
    _require_way(of, to, base, exact, threshold, order)
    source, target = Path(path).expanduser(), Path(out).expanduser()
    if not source.exists():
        raise SourceError(f"{path}: no such file or folder")
    if source.resolve() == target.resolve():
        raise WriteError(f"{out} is what is converted; name another file or folder")
    if to != "delta":
        return _outwards(source, target, to, base, offline, overwrite)
    assert base is not None
    with open_source(base, offline=offline) as model:
        if of == "composable-sft":
            moves = composable.read(source)
        elif of == "shira":
            moves = shira.read(source, model)
        else:
            names = None if order is None else Path(order).expanduser()
            moves = sara.read(source, model, threshold=threshold, order=names)
        return _inwards(moves, model, target, of, str(path), exact, overwrite)


def _require_way(
    of: str,
    to: str,
    base: str | None,
    exact: bool,
    threshold: float | None,
    order: Where | None,
) -> None:
    """Refuse what has no way, and words that would have no effect."""
    if (of == "delta") == (to == "delta"):
        raise PlanError("one of --from and --to is `delta`, the other another tool's format")
    if to == "sara":
        raise PlanError("SaRA's files hold no places, so a delta cannot be written as one")
    if base is None and to == "delta":
        raise PlanError(
            f"--from {of} needs --base: a delta file records of which bytes it is, {of}'s do not"
        )
    if exact and (to != "delta" or of == "sara"):
        why = "SaRA's values are exact by themselves" if of == "sara" else "OUT is no delta file"
        raise PlanError(f"--exact has no effect here: {why}")
    if of != "sara" and (threshold is not None or order is not None):
        raise PlanError("--threshold and --order are for SaRA's file")


def _inwards(
    moves: list[Move],
    base: Source,
    out: Path,
    of: str,
    where: str,
    exact: bool,
    overwrite: bool,
) -> Converted:
    """Write moves as a delta file of a base."""
    own = _own_names(moves, base, where)
    renamed = {one: other for one, other in own.items() if one != other}
    words = {
        "method": of,
        "parameters": {"exact": exact},
        "provenance": {"converted_from": where, "renamed": dict(sorted(renamed.items()))},
    }
    named = (replace(move, name=own[move.name]) for move in moves)
    landed = land(named, base, out, words, replacing=exact, overwrite=overwrite)
    notes = [f"{one} is {other} in {base.reference}" for one, other in sorted(renamed.items())]
    if landed.idle:
        notes.append(f"{landed.idle:,} entries change nothing and were left out")
    return Converted(out, landed.tensors, landed.entries, landed.whole, tuple(notes))


def _own_names(moves: list[Move], base: Source, where: str) -> dict[str, str]:
    """Return the base's name for each of a foreign file."""
    sparse = [move.name for move in moves if move.kind != "dense"]
    rule = naming(sparse, base, where) if sparse else str
    own = {name: base.locate(rule(name)) or name for name in sparse}
    for move in moves:
        if move.kind == "dense":  # a head may be new to the base
            own[move.name] = rule(move.name) if rule(move.name) in base else move.name
    twice = [name for name in own.values() if list(own.values()).count(name) > 1]
    if twice:
        raise SourceError(f"{where}: changes {twice[0]} of {base.reference} under two names")
    return own


def _outwards(
    source: Path, out: Path, to: str, base: str | None, offline: bool, overwrite: bool
) -> Converted:
    """Write a delta file in another format."""
    with closing(open_delta(source)) as delta, ExitStack() as held:
        known = base or _local_base(delta) if to == "shira" else base
        model = held.enter_context(open_source(known, offline=offline)) if known else None
        _require_for(delta, model)
        moves = list(_sound(delta))
        with _made_whole(out, overwrite) as part:
            if to == "shira":
                assert model is not None
                written, inexact = shira.write(moves, part, model)
                found = shira.read(part, model)
            else:
                written, inexact = composable.write(moves, part)
                found = composable.read(part)
            require_same({move.name: move.digest for move in written}, found, str(out))
    entries = sum(move.values.numel() for move in moves)
    zeros = sum(move.values.numel() for move in written) - entries
    notes = [f"{zeros:,} zeros fill the layers up"] if zeros else []
    if inexact:
        notes.append(
            f"{inexact:,} entries come out beside the delta's own values in the last places: "
            "their difference to the base is no float32"
        )
    whole = sum(move.indices is None for move in moves)
    return Converted(out, len(moves), entries, whole, tuple(notes))


def _local_base(delta: DeltaFile) -> str:
    """Return the base that a delta names, if it lies here; nothing is fetched unasked."""
    named = str(delta.words["base"].get("id") or "")
    if not named or not Path(named).expanduser().is_dir():
        raise PlanError(
            f"--to shira needs --base: it tells which layers are linear, and {named or 'the base'} "
            "that the delta was made for is not a folder here"
        )
    return named


def _require_for(delta: DeltaFile, base: Source | None) -> None:
    """Refuse a base that the delta was not made for."""
    for change in delta.changes.values() if base is not None else ():
        assert base is not None
        if change.sha256 is not None and change.name not in base:
            raise SourceError(f"{delta.reference}: {base.reference} has no {change.name}")
        require_base(base, change, delta)


def _sound(delta: DeltaFile) -> Iterator[Move]:
    for move in moves_of(delta):
        require_sound(move, delta.reference)
        yield move


@contextmanager
def _made_whole(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to fill; it takes its name as the last act, or leaves nothing."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise WriteError(f"{out} is a file or a link; name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise WriteError(f"{out} is not empty; name another folder, or give --overwrite")
    part = out.with_name(out.name + ".part")
    if part.exists():
        raise WriteError(f"{part} is in the way; remove it, or name another folder")
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        raise WriteError(
            f"{out}: cannot be written: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
