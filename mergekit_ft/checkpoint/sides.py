"""Side files: everything of the donor that is not weights comes along."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_ft.checkpoint import licences
from mergekit_ft.checkpoint.config import config_bytes
from mergekit_ft.errors import SourceError, WriteError
from mergekit_ft.sources.sides import RECEIPT

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution

OURS = re.compile(  # what we write as well: the donor's, and its donor's
    r"(?i:(README))((?:\.base)*)\.md|(mergekit_config)((?:\.base)*)\.yml"
)


@dataclass(frozen=True)
class Listing:
    """What comes along and what stays behind, as paths within the folder."""

    copied: dict[str, str]  # the donor's name -> the output's
    code: tuple[str, ...]  # custom code, copied only when asked
    left: tuple[str, ...]  # weight files that are not this model


def listing(resolution: Resolution) -> Listing:
    """Return the side files of the donor."""
    donor = resolution.donor
    names = [path.as_posix() for path in donor.side_files()]
    copied = {name: _named(name) for name in names if name != RECEIPT}
    for name, by in donor.around.replaced.items():
        copied.pop(name, None)
        copied |= {} if by is None else {name: name}
    return Listing(copied, tuple(path.as_posix() for path in donor.code_files()), donor.unread)


def copy_sides(resolution: Resolution, part: Path, *, copy_code: bool) -> list[str]:
    """Copy every side file byte for byte, custom code if asked; return the names they have."""
    folder, found = resolution.donor.folder, listing(resolution)
    if folder is None:
        return []
    wanted = found.copied | ({name: name for name in found.code} if copy_code else {})
    for name, to in wanted.items():
        by = resolution.donor.around.replaced.get(name)
        content = config_bytes(resolution) if name == "config.json" else by
        _put(folder / name if content is None else content, part / to)
    return list(wanted.values())


def notes(resolution: Resolution, *, copy_code: bool) -> Iterator[str]:
    """Say what stays behind, and which licences do not go together."""
    found, donor = listing(resolution), resolution.donor.reference
    if found.code and not copy_code:
        yield (
            f"{donor}: custom code is not copied ({', '.join(found.code)}); read it, then "
            "--copy-code brings it along"
        )
    if found.left:
        yield f"{donor}: other weight files stay behind ({', '.join(found.left)})"
    yield from licences.warnings(resolution)


def _named(name: str) -> str:
    """Return the output's name: the donor's card and plan make room for ours."""
    match = OURS.fullmatch(name)
    if match is None:
        return name
    return f"README{match[2]}.base.md" if match[1] else f"mergekit_config{match[4]}.base.yml"


def _put(source: Path | bytes, target: Path) -> None:
    """Copy a file, or write content."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        if isinstance(source, Path) and error.filename == str(source):
            raise SourceError(f"{source}: cannot be read: {error.strerror or error}") from error
        raise WriteError(f"{target}: {error.strerror or error}") from error
