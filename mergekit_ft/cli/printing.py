"""What commands print, and what they read from stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click


def lines(found: Iterable[str]) -> None:
    """Print lines."""
    click.echo("\n".join(found))


def json_of(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def plan_of(plan: str) -> str:
    """Return the plan's file, or the text that stdin gives."""
    if plan != "-":
        return plan
    text = sys.stdin.read()
    return text if "\n" in text else text + "\n"  # a line's end tells a text from a file's name


@contextmanager
def watched(quiet: bool) -> Iterator[Any]:
    """Give what shows the progress, and end it whatever comes."""
    if quiet:
        yield None
        return
    from mergekit_ft.inspection.progress import watcher

    shown = watcher()
    try:
        yield shown
    finally:
        shown.close()
