"""The command that sends a merge to the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.publishing import Pushed


@click.command(epilog="Stopped, the same command goes on: what the hub has is not sent again.")
@click.argument("out", type=click.Path(file_okay=False))
@click.argument("repo")
@click.option("--public", is_flag=True, help="For everyone to see; else private.")
@click.option("--overwrite", is_flag=True, help="Replace the weights of another model.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def push(out: str, repo: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Hash OUT's files again and send them to REPO (org/name) on the hub, the card first."""
    done = pushed(out, repo, quiet=quiet, **options)
    if as_json:
        printing.json_of(asdict(done))
    elif not quiet:
        printing.lines(lines(done))


def pushed(out: str, repo: str, *, quiet: bool, **options: Any) -> Pushed:
    """Push a merge, with bars where somebody watches."""
    from mergekit_ft import publishing

    shown = not quiet and sys.stderr.isatty()
    with printing.watched(quiet=not shown) as progress, _bars(shown):
        return publishing.push(Path(out), repo, progress=progress, **options)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Let the hub's client show its bars, or not."""
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils  # it states no types for these
    if shown or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def lines(done: Pushed) -> Iterator[str]:
    """Yield what the hub holds now."""
    from mergekit_ft.inspection.tables import count

    yield from (f"note: {note}" for note in done.notes)
    if done.deleted:
        yield f"deleted: {', '.join(done.deleted)}"
    seen = "private" if done.private else "public"
    yield (
        f"{done.url} ({seen}) at {done.commit[:12]}: sent {count(len(done.sent), 'file')}, "
        f"{len(done.there)} there already"
    )
