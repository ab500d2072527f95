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


class Counted:
    """Work that is counted: a bar on a terminal, a line for each piece elsewhere."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._bar: Any = None

    def start(self, total: int, what: str) -> None:
        """Say what begins."""
        from tqdm import tqdm

        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=self.unit, leave=False, file=sys.stderr)
        else:
            click.echo(f"{what}: {total:,} {self.unit}s", err=True)

    def advance(self, done: int) -> None:
        """Hear of what is done."""
        if self._bar is not None:
            self._bar.update(done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def watched(quiet: bool, unit: str | None = None) -> Iterator[Any]:
    """Give what shows the progress, of bytes or of a `unit`, and end it whatever comes."""
    if quiet:
        yield None
        return
    from mergekit_ft.inspection.progress import watcher

    shown = watcher() if unit is None else Counted(unit)
    try:
        yield shown
    finally:
        shown.close()
