"""A parameter's setting: a scalar, a gradient, or entries that select tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from mergekit_ft.layers import Place
from mergekit_ft.plan.fields import Parameter, shown
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.reading import Reading
from mergekit_ft.registry import did_you_mean

ENTRY_KEYS = ("value", "filter", "match", "layers")


@dataclass(frozen=True)
class Gradient:
    """Values along the depth of a stack."""

    values: tuple[Any, ...]

    @property
    def numeric(self) -> bool:
        """Say whether the values are interpolated, not picked."""
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)

    def at(self, t: float) -> Any:
        """Return the value at depth t in [0, 1]."""
        s = t * (len(self.values) - 1)
        i = int(s)
        if not self.numeric:
            return self.values[i]
        j = min(len(self.values) - 1, i + 1)
        f = s - i
        return (1 - f) * self.values[i] + f * self.values[j]


@dataclass(frozen=True)
class Selector:
    """Which tensors an entry is for; all that is given must hold."""

    filter: str | None = None  # case-sensitive substring
    match: str | None = None  # glob
    layers: tuple[int, int | None] | None = None  # first, last; in every stack

    @cached_property
    def _glob(self) -> re.Pattern[str]:
        return re.compile(translate(self.match or "*"))

    def matches(self, name: str, place: Place) -> bool:
        """Say whether a tensor is selected."""
        if self.filter is not None and self.filter not in name:
            return False
        if self.layers is not None and not self._has_layer(place.layer):
            return False
        return self.match is None or self._glob.match(name) is not None

    def _has_layer(self, layer: int | None) -> bool:
        assert self.layers is not None
        first, last = self.layers
        return layer is not None and first <= layer and (last is None or layer <= last)

    def __str__(self) -> str:
        parts = [f"{key} '{getattr(self, key)}'" for key in ("filter", "match")]
        parts = [part for part in parts if not part.endswith(" 'None'")]
        if self.layers is not None:
            first, last = self.layers
            until = "" if last is None else last
            parts.append(f"layers {first}" if first == last else f"layers {first}..{until}")
        return " with ".join(parts)


@dataclass(frozen=True, eq=False)
class Clause:
    """One value and the tensors it is for; None: all."""

    value: Any  # converted to the method's type; maybe a Gradient
    selector: Selector | None
    path: Keys


@dataclass(frozen=True, eq=False)
class Setting:
    """All that one place in a plan says of one parameter; the first clause that holds wins."""

    clauses: tuple[Clause, ...]
    path: Keys
    broken: bool = False  # a fault was reported, so what is missing here is no second fault


def read_setting(raw: Any, parameter: Parameter, path: Keys, reading: Reading) -> Setting:
    """Return the setting that a plan's raw value means; faults go to the reading."""
    reader = _Reader(parameter, reading)
    clauses = reader.clauses(raw, path)
    return Setting(tuple(clauses), path, reader.broken)


class _Reader:
    """Read one setting, writing down its faults."""

    def __init__(self, parameter: Parameter, reading: Reading) -> None:
        self.parameter = parameter
        self.reading = reading
        self.broken = False

    def clauses(self, raw: Any, path: Keys) -> list[Clause]:
        if self.parameter.scope == "plan":
            return self._whole(raw, path)
        if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
            found = [self._item(item, (*path, i)) for i, item in enumerate(raw)]
        else:
            found = [self._entry(raw, path) if isinstance(raw, dict) else self._all(raw, path)]
        return [clause for clause in found if clause is not None]

    def _whole(self, raw: Any, path: Keys) -> list[Clause]:
        """Read a parameter that has one value for the whole plan."""
        try:
            return [Clause(self.parameter.value(raw), None, path)]
        except ValueError as error:
            message = str(error)
            if isinstance(raw, list | dict):
                word = self.parameter.word
                message = f"{word} has one value for the whole plan: no gradient, no filter"
            self._fault(path, message)
            return []

    def _item(self, raw: Any, path: Keys) -> Clause | None:
        if isinstance(raw, dict):
            return self._entry(raw, path)
        self._fault(path, "a list holds numbers (a gradient) or entries with `value:`, not both")
        return None

    def _all(self, raw: Any, path: Keys) -> Clause | None:
        value = self._value(raw, path)
        return None if value is _NO_VALUE else Clause(value, None, path)

    def _entry(self, raw: dict[str, Any], path: Keys) -> Clause | None:
        for key in raw:
            if key not in ENTRY_KEYS:
                hint = did_you_mean(key, ENTRY_KEYS)
                valid = ", ".join(ENTRY_KEYS)
                message = f"unknown key '{key}' in an entry of {self.parameter.word}{hint}"
                self._idle((*path, key), f"{message} (valid: {valid})", key=True)
        if "value" not in raw:
            self._fault(path, f"this entry of {self.parameter.word} has no `value:`")
            return None
        value = self._value(raw["value"], (*path, "value"))
        selector = self._selector(raw, path)
        broken = value is _NO_VALUE or selector is _NO_SELECTOR
        return None if broken else Clause(value, selector, path)

    def _value(self, raw: Any, path: Keys) -> Any:
        """Return a scalar or a gradient in the method's type."""
        items = list(enumerate(raw)) if isinstance(raw, list) else [(None, raw)]
        if not items:
            self._idle(path, f"an empty list gives {self.parameter.word} no value")
            return _NO_VALUE
        values = [self._scalar(item, path if i is None else (*path, i)) for i, item in items]
        if any(value is _NO_VALUE for value in values):
            return _NO_VALUE
        return self._gradient(tuple(values), path) if isinstance(raw, list) else values[0]

    def _scalar(self, raw: Any, path: Keys) -> Any:
        try:
            return self.parameter.value(raw)
        except ValueError as error:
            self._fault(path, str(error))
            return _NO_VALUE

    def _gradient(self, values: tuple[Any, ...], path: Keys) -> Any:
        gradient = Gradient(values)
        if len(set(values)) == 1:
            return values[0]
        if gradient.numeric and all(isinstance(v, int) for v in values):
            word = self.parameter.word
            self._fault(path, f"{word} takes whole numbers: a gradient gives others; use `layers:`")
            return _NO_VALUE
        return gradient

    def _selector(self, raw: dict[str, Any], path: Keys) -> Selector | None:
        words = {key: self._words(raw, key, path) for key in ("filter", "match", "layers")}
        if words["filter"] == "*":
            words["filter"] = None
        layers = words["layers"] and self._layers(words["layers"], (*path, "layers"))
        if _NO_TEXT in words.values() or layers == ():
            return _NO_SELECTOR
        if words["filter"] is None and words["match"] is None and layers is None:
            return None
        return Selector(words["filter"], words["match"], layers or None)

    def _words(self, raw: dict[str, Any], key: str, path: Keys) -> str | None:
        value = raw.get(key)
        if value is None:
            return None
        written = self.reading.marks.nearest((*path, key)).text
        if isinstance(value, list | dict | bool) or value == "":
            self._fault((*path, key), f"{key} must be text; got {shown(value)}")
            return _NO_TEXT
        return written if written is not None else str(value)

    def _layers(self, text: str, path: Keys) -> tuple[int, int | None] | tuple[()]:
        if text == _NO_TEXT:
            return ()
        hit = re.fullmatch(r"([0-9]*)\s*(\.\.)?\s*([0-9]*)", text.strip())
        if hit is None or not (hit[1] or hit[3]) or (hit[3] and not hit[2]):
            self._fault(path, f"layers is a number or a range (4..12, 4.., ..12); got '{text}'")
            return ()
        first = int(hit[1] or 0)
        last = (int(hit[3]) if hit[3] else None) if hit[2] else first
        if last is not None and last < first:
            self._fault(path, f"layers {text} is empty; write {last}..{first}")
            return ()
        return first, last

    def _idle(self, path: Keys, message: str, *, key: bool = False) -> None:
        """Report what the rest does without, as mergekit does."""
        aside = path if path[0] != "then" else None
        self.broken = self.broken or aside is None
        self.reading.add(path, message, key=key, aside=aside)

    def _fault(self, path: Keys, message: str, *, key: bool = False) -> None:
        self.broken = True
        self.reading.add(path, message, key=key)


_NO_VALUE: Any = object()
_NO_TEXT = "\0"
_NO_SELECTOR = Selector(filter=_NO_TEXT)
