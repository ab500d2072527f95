"""Globs that say which tensors an adapter may change; each must match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from mergekit_ft.errors import PlanError
from mergekit_ft.registry import nearest


@dataclass
class Selectors:
    """Which names are meant: those that a glob of `include` matches (or all), less `exclude`."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    matches: dict[str, int] = field(default_factory=dict)  # "include GLOB" -> names it matched

    def chosen(self, names: Sequence[str]) -> set[str]:
        """Return the names that are meant; a glob that matches none is an error."""
        wanted = self._matched("include", self.include, names) if self.include else set(names)
        return wanted - self._matched("exclude", self.exclude, names)

    def _matched(self, word: str, globs: Sequence[str], names: Sequence[str]) -> set[str]:
        found: set[str] = set()
        idle = []
        for glob in globs:
            hits = {name for name in names if fnmatchcase(name, glob)}
            self.matches[f"{word} {glob}"] = len(hits)
            idle += [] if hits else [glob]
            found |= hits
        if idle:
            raise PlanError("\n".join(f"--{word} {_told(glob, names)}" for glob in idle))
        return found


def _told(glob: str, names: Sequence[str]) -> str:
    near = nearest(glob, names, most=2)
    hint = f" (nearest: {', '.join(near)})" if near else f" (the first is {names[0]})"
    whole = (
        "" if "*" in glob else "; a glob matches whole names, so '*' stands for what is left out"
    )
    return f"'{glob}' matches no tensor{hint}{whole}"
