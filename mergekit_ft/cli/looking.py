"""The commands that look at a checkpoint."""

from __future__ import annotations

import sys
from typing import Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.group import DIFFERENT


@click.command()
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--sample", type=click.IntRange(0), default=16, show_default=True, help="Tensors.")
@click.option("--full", is_flag=True, help="Compute every tensor again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option("--inputs/--no-inputs", default=None, help="Insist on hashing the inputs, or do not.")
@click.option(
    "--memory", type=settings.SIZE, default="4GiB", show_default=True, help="For one tensor."
)
@settings.root
@click.option("--download", is_flag=True, help="Fetch inputs that the hub's cache lacks.")
@settings.as_json
def verify(out: str, as_json: bool, **asked: Any) -> None:
    """Hash OUT's files again and recompute a sample of its tensors in float64."""
    from pathlib import Path

    from mergekit_ft.inspection import verify as room

    sample = None if asked.pop("full") else asked.pop("sample")
    asked.pop("sample", None)
    root, offline = asked.pop("root"), not asked.pop("download")
    where = Path(root) if root else None
    with printing.watched(quiet=not sys.stderr.isatty()) as bar:
        found = {"sample": sample, "root": where, "offline": offline, "progress": bar}
        report = room.verify(Path(out), **found, **asked)
    if as_json:
        printing.json_of(report)
    else:
        printing.lines(room.lines(report))
    click.get_current_context().exit(0 if report["ok"] else DIFFERENT)


@click.command()
@click.argument("path")
@click.option("--tensors/--no-tensors", default=True, help="List every tensor.")
@settings.offline
@settings.allow_pickle
@settings.as_json
def inspect(path: str, as_json: bool, **options: Any) -> None:
    """Say what the headers of the checkpoint at PATH (a folder, or a hub id) hold."""
    from mergekit_ft.inspection import headers

    report = headers.inspect(path, **options)
    if as_json:
        printing.json_of(report)
    else:
        printing.lines(headers.lines(report))
