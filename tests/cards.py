"""The sections and tables of a method's card."""

from __future__ import annotations

import re
from typing import Any

from mergekit_ft import registry
from mergekit_ft.plan.fields import REQUIRED

SECTIONS = (
    "What it computes",
    "When to use it",
    "Parameters",
    "Paper to code",
    "What differs",
    "What we measured",
    "Citation",
)


def section(name: str, title: str) -> str:
    text = registry.card(name)
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def table(name: str, title: str) -> list[list[str]]:
    """Return the cells of a section's table, without its two head lines."""
    lines = [line for line in section(name, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown(default: Any) -> str:
    """Return a default as a card shows it."""
    if default is REQUIRED:
        return "required"
    return f"`{'none' if default is None else str(default).lower()}`"
