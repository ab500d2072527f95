"""Edits of a JSON text by dotted key; all that is not edited keeps its bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Member:
    """The spans of one key of an object and of its value."""

    key: str
    start: int  # of the key
    value: int
    stop: int


def edited(text: str, edits: Mapping[str, Any]) -> str:
    """Return the text with the value of each dotted key set; None leaves the key out.

    The text holds an object. A key that is not there comes last in its object.
    """
    for path, value in edits.items():
        text = _edited(text, _after_space(text, int(text.startswith("\ufeff"))), path, value)
    return text


def _edited(text: str, at: int, path: str, value: Any) -> str:
    """Edit the object that begins at a place."""
    members = list(_members(text, at))
    whole = next((m for m in members if m.key == path), None)
    parent, _, rest = path.partition(".")
    inner = next((m for m in members if m.key == parent and rest and text[m.value] == "{"), None)
    if whole is None and inner is not None:
        return _edited(text, inner.value, rest, value)
    if value is None:
        return text if whole is None else _without(text, members, whole)
    if whole is not None:
        return text[: whole.value] + _dumped(text, whole.start, value) + text[whole.stop :]
    wanted = {rest: value} if rest else value
    return _with_more(text, at, members, parent, wanted)


def _members(text: str, at: int) -> Iterator[_Member]:
    """Yield the members of the object that begins at a place."""
    at = _after_space(text, at + 1)
    while text[at] != "}":
        start = at
        key, at = _DECODER.raw_decode(text, at)
        value = _after_space(text, _after_space(text, at) + 1)
        _, stop = _DECODER.raw_decode(text, value)
        yield _Member(key, start, value, stop)
        at = _after_space(text, stop)
        at = _after_space(text, at + 1) if text[at] == "," else at


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _without(text: str, members: list[_Member], gone: _Member) -> str:
    """Leave a member out, with the comma that parted it from its neighbour."""
    i = members.index(gone)
    if i + 1 < len(members):
        return text[: gone.start] + text[members[i + 1].start :]
    return text[: members[i - 1].stop if i else gone.start] + text[gone.stop :]


def _with_more(text: str, at: int, members: list[_Member], key: str, value: Any) -> str:
    """Add a member at the end, spaced as those before it."""
    name = json.dumps(key, ensure_ascii=False)
    if not members:
        return f"{text[: at + 1]}{name}: {json.dumps(value)}{text[at + 1 :]}"
    last, first = members[-1], members[0]
    gap = text[at + 1 : first.start]
    added = f"{name}: {_dumped(text, first.start, value)}"
    return f"{text[: last.stop]},{gap or ' '}{added}{text[last.stop :]}"


def _dumped(text: str, at: int, value: Any) -> str:
    """Return a value's JSON, indented as its key is where lines are."""
    start = text.rfind("\n", 0, at) + 1
    indent = text[start:at]
    if indent.strip() or not start or not isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, indent=2).replace("\n", "\n" + indent)
