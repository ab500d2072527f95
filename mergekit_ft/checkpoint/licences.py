"""What the models' cards say of their licences, and whether that can go together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution
    from mergekit_ft.sources import Source

FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
KEYS = ("license", "license_name", "license_link")
LONGEST = 1 << 20  # bytes of a card that are read
NOT_FOR_TRADE = re.compile(r"(^|[-_ ])(nc|non-?commercial|research)([-_ ]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """What one model's card says."""

    stated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return its identifier, or its name where it has none; "" where nothing is stated."""
        words = self.stated.get("license")
        names = [str(word) for word in (words if isinstance(words, list) else [words]) if word]
        named = self.stated.get("license_name")
        if named and names in ([], ["other"]):
            return str(named)
        return " and ".join(names)

    @property
    def not_for_trade(self) -> bool:
        """Say whether its name speaks against commercial use."""
        return NOT_FOR_TRADE.search(self.name) is not None

    def __str__(self) -> str:
        return self.name or "not stated"


def of(source: Source) -> Licence:
    """Return what the front matter of a model's card says of its licence."""
    front = _front_matter(source.folder / "README.md") if source.folder else {}
    return Licence({key: front[key] for key in KEYS if key in front})


def agreed(resolution: Resolution) -> Mapping[str, Any]:
    """Return the licence of the output's card: that of all models which state one, else nothing."""
    stated = [licence for licence in map(of, resolution.leaves) if licence.name]
    return stated[0].stated if len({licence.name for licence in stated}) == 1 else {}


def warnings(resolution: Resolution) -> Iterator[str]:
    """Say where licences conflict, are not stated, or speak against commercial use."""
    found = {source.reference: of(source) for source in resolution.leaves}
    names = {licence.name for licence in found.values() if licence.name}
    if len(names) > 1:
        said = ", ".join(f"{model}: {licence}" for model, licence in found.items())
        yield (
            f"the models' licences differ ({said}), so the card names none: whoever passes the "
            "merge on must keep to all of them"
        )
    unstated = [model for model, licence in found.items() if not licence.name]
    if names and unstated:
        yield f"no licence is stated by {', '.join(unstated)}; ask before you pass the merge on"
    limited = [f"{model} ({licence})" for model, licence in found.items() if licence.not_for_trade]
    if limited:
        yield f"licences that speak against commercial use: {', '.join(limited)}"


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML front matter of a card; {} where there is none to be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            match = FRONT.match(file.read(LONGEST))
        front = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
