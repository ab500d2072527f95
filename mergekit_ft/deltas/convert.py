"""convert(): deltas of other tools to delta files, and back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from mergekit_ft.deltas import composable, sara, shira
from mergekit_ft.deltas.foreign import Converted, Foreign, placed, write
from mergekit_ft.errors import PlanError, WriteError
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.delta_file import open_delta

Format = Literal["composable-sft", "shira", "sara", "delta"]
FORMATS: tuple[Format, ...] = ("composable-sft", "shira", "sara", "delta")


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    of: Format,
    to: Format,
    base: str | None = None,
    exact: bool = False,
    overwrite: bool = False,
    offline: bool = False,
) -> Converted:
    """Write a delta in another format; to a delta file it takes the base, whose hashes it records.

    `exact` stores what comes out on the base, rounded once, and what was there, so that it comes
    off to the bit; else what is added.
    """
    if (of == "delta") == (to == "delta"):
        raise PlanError("one of --from and --to is `delta`, the other another tool's format")
    source, target = Path(path).expanduser(), Path(out)
    if to != "delta":
        return _outwards(source, target, to, overwrite)
    if base is None:
        raise PlanError(
            f"--from {of} needs --base: a delta file records of which bytes it is, {of}'s do not"
        )
    with open_source(base, offline=offline) as model:
        foreign = placed(_read(source, of, model), model)
        if of == "shira":
            widths = {name: model[name].shape[1] for name in foreign.added}
            foreign = shira.flattened(foreign, widths)
        made = write(foreign, model, target, of, exact=exact, overwrite=overwrite)
    delta = open_delta(target)  # what was written agrees with itself
    delta.close()
    return made


def _read(path: Path, of: Format, base: Source) -> Foreign:
    if of == "composable-sft":
        return composable.read(path)
    return shira.read(path) if of == "shira" else sara.read(path, base)


def _outwards(source: Path, out: Path, to: Format, overwrite: bool) -> Converted:
    """Write a folder beside OUT and give it its name last."""
    if to == "sara":
        raise PlanError("SaRA's files hold no places, so a delta cannot be written as one")
    if out.exists() and not overwrite:
        raise WriteError(f"{out} exists; give --overwrite, or another name")
    part = out.with_name(out.name + ".part")
    delta = open_delta(source)
    try:
        shutil.rmtree(part, ignore_errors=True)
        writer = composable.write if to == "composable-sft" else shira.write
        entries = writer(delta, part)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    except OSError as error:
        raise WriteError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        delta.close()
        shutil.rmtree(part, ignore_errors=True)
    return Converted(out, len(delta.changes), entries)
