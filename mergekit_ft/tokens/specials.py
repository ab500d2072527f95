"""Ids of tokens in config.json and generation_config.json, kept on their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ft.sources.ties import TEXT_CONFIGS

_KEY = re.compile(r".*_token_ids?|.*_token_index|(begin_)?suppress_tokens|image_token_index")


@dataclass(frozen=True)
class Ids:
    """The ids that one file names, in another vocabulary."""

    edits: Mapping[str, Any]  # by dotted key, those that change
    unknown: tuple[str, ...]  # what has no token in the new vocabulary, and nothing to take instead
    notes: tuple[str, ...]


def moved(
    config: Mapping[str, Any],
    old: Mapping[int, str],
    new: Mapping[str, int],
    instead: Mapping[str, Any],
) -> Ids:
    """Return what the ids of a config become: their tokens' new ones, else what `instead` names."""
    edits: dict[str, Any] = {}
    unknown, notes = [], []
    for key, value in named_ids(config):
        found = _each(value, lambda number: new.get(old.get(number, "")))
        if found is None and isinstance(_at(instead, key), int | list):
            found = _at(instead, key)
            notes.append(f"{key}: {found}, as the tokenizer's own model has it, not {value}")
        if found is None:
            missing = [repr(old.get(n, f"id {n}")) for n in _numbers(value)]
            unknown.append(f"{key} {value} ({', '.join(missing)})")
        elif found != value:
            edits[key] = found
    return Ids(edits, tuple(unknown), tuple(notes))


def named_ids(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key that names ids of tokens, dotted, and its value; what is unset is left out."""
    parts = [("", config)]
    parts += [(f"{key}.", config[key]) for key in TEXT_CONFIGS if isinstance(config.get(key), dict)]
    for prefix, part in parts:
        for key, value in part.items():
            if _KEY.fullmatch(key) and any(number >= 0 for number in _numbers(value)):
                yield prefix + key, value


def largest(value: Any) -> int:
    """Return the largest id of a value."""
    return max(_numbers(value), default=-1)


def _numbers(value: Any) -> list[int]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int]


def _each(value: Any, find: Callable[[int], int | None]) -> Any:
    """Map an id, or each of a list; None where one is not found."""
    if type(value) is int:
        return find(value)
    if not isinstance(value, list):
        return value
    found = [find(item) if type(item) is int and item >= 0 else item for item in value]
    return None if None in found else found


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for step in key.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value
