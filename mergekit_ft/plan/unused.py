"""Words of a plan that decided nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from mergekit_ft.errors import Fault
from mergekit_ft.layers import Place
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.settings import Clause, Selector, Setting
from mergekit_ft.registry import nearest


@dataclass
class Seen:
    """Which tensors were asked for, and which clauses of the plan had a say."""

    places: dict[str, Place] = field(default_factory=dict)  # by name
    stacks: dict[str, int] = field(default_factory=dict)  # stack -> layers
    matched: set[Clause] = field(default_factory=set)
    decided: set[Clause] = field(default_factory=set)

    def tensor(self, name: str, place: Place) -> None:
        """Note one tensor."""
        self.places[name] = place
        if place.layer is not None:
            self.stacks[place.stack] = max(place.layers, self.stacks.get(place.stack, 0))

    @property
    def names(self) -> list[str]:
        """Return the names that were asked for."""
        return list(self.places)


def without_effect(settings: Iterable[Setting], seen: Seen, reading: Reading) -> list[Fault]:
    """Return a fault for each part of a setting that decided no value."""
    if not seen.places:
        return []
    return [fault for setting in settings for fault in _idle(setting, seen, reading)]


def _idle(setting: Setting, seen: Seen, reading: Reading) -> list[Fault]:
    unmatched = [clause for clause in setting.clauses if clause not in seen.matched]
    found = [_matches_nothing(setting, clause, seen, reading) for clause in unmatched]
    if setting.broken:  # what is missing may have decided
        return found
    shadowed = [c for c in setting.clauses if c in seen.matched and c not in seen.decided]
    if shadowed and not any(clause in seen.decided for clause in setting.clauses):
        message = f"'{setting.path[-1]}' has no effect here: every tensor's value comes from a"
        message += " nearer level (each model gives its own); remove it"
        return [*found, reading.fault(setting.path, message, key=True, aside=_aside(setting))]
    message = "this entry never decides: earlier ones take every tensor it is for; remove it"
    return found + [reading.fault(c.path, message, aside=_aside(setting, c)) for c in shadowed]


def _aside(setting: Setting, clause: Clause | None = None) -> Keys | None:
    """Return the path of what mergekit reads without effect; None where a word is ours alone."""
    clauses = setting.clauses if clause is None else (clause,)
    ours = any(c.selector and (c.selector.match or c.selector.layers) for c in setting.clauses)
    if ours or setting.path[0] == "then":
        return None
    return clauses[0].path if clause is not None else setting.path


def _matches_nothing(setting: Setting, clause: Clause, seen: Seen, reading: Reading) -> Fault:
    selector = clause.selector
    assert selector is not None  # what has no selector matches every tensor
    if any(selector.matches(name, place) for name, place in seen.places.items()):
        said = f"{selector} matches no tensor here, only those of other slices"
        return reading.fault(clause.path, said, aside=_aside(setting, clause))
    key, hint = _reason(selector, seen)
    path: Keys = (*clause.path, key)
    said = f"{selector} matches no tensor{hint}"
    return reading.fault(path, said, aside=_aside(setting, clause))


def _reason(selector: Selector, seen: Seen) -> tuple[str, str]:
    """Return the key that is to blame, and what would match."""
    if selector.filter is not None and not any(selector.filter in name for name in seen.names):
        return "filter", _for_filter(selector.filter, seen.names)
    if selector.match is not None and not any(
        Selector(match=selector.match).matches(name, Place()) for name in seen.names
    ):
        return "match", _for_glob(selector.match, seen.names)
    if selector.layers is None:
        return "filter", ": each part matches some, but none all parts"
    if all(selector.layers[0] >= layers for layers in seen.stacks.values()):
        return "layers", _for_layers(seen.stacks)
    return "layers", ": each part matches some, but none all parts"


def _for_layers(stacks: dict[str, int]) -> str:
    if not stacks:
        return "; no tensor has a layer number"
    return "; layers are " + ", ".join(f"{s or '(top)'} 0..{n - 1}" for s, n in stacks.items())


def _for_filter(word: str, names: list[str]) -> str:
    if re.search(r"[*?\[\]|^$\\]", word):
        return f"; filter is a plain substring, for a glob write `match: '*{word.strip('*')}*'`"
    dots = word.strip(".").count(".") + 1
    near = nearest(word, _runs(_kinds(names), dots))
    return f"; nearest: {', '.join(near)}" if near else _some(names)


def _for_glob(glob: str, names: list[str]) -> str:
    kinds = _kinds(names)
    if not re.search(r"[*?\[]", glob) and any(glob in name for name in names):
        return f"; a glob is for the whole name: write `match: '*{glob}*'`"
    near = nearest(glob.replace("*", ""), kinds)
    return f"; nearest names: {', '.join(near)}" if near else _some(names)


def _some(names: list[str]) -> str:
    return f"; names are like {', '.join(_kinds(names)[:3])}"


def _kinds(names: list[str]) -> list[str]:
    """Return one name for all that differ only in numbers."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"[0-9]+", "0", name), name)
    return list(kinds.values())


def _runs(names: list[str], length: int) -> list[str]:
    """Return every distinct run of so many segments."""
    runs: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        for i in range(len(segments) - length + 1):
            runs[".".join(segments[i : i + length])] = None
    return list(runs)
