"""The commands that make, put on, take off and tell of deltas."""

from __future__ import annotations

from typing import Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.extracting import compose, extract


@click.group()
def delta() -> None:
    """Make, apply, revert and look at deltas: changes to a model as small, checked files."""


delta.add_command(extract)
delta.add_command(compose)


def _writing(command: Any) -> Any:
    for option in reversed(
        [
            click.option(
                "--memory",
                type=settings.SIZE,
                default="1GiB",
                show_default=True,
                help="Bytes for blocks.",
            ),
            click.option(
                "--threads", type=click.IntRange(1), help="Workers; one a core, at most 8."
            ),
            click.option("--resume", is_flag=True, help="Finish what a stopped run left."),
            click.option(
                "--overwrite", is_flag=True, help="Replace OUT once the new one is whole."
            ),
            settings.offline,
            click.option("--quiet", is_flag=True, help="Print nothing but errors."),
            settings.as_json,
        ]
    ):
        command = option(command)
    return command


@delta.command()
@click.argument("base")
@click.argument("file")
@click.argument("out")
@click.option("--scale", type=float, default=1.0, help="Times what is added; 1.0 if not given.")
@_writing
def apply(
    base: str, file: str, out: str, scale: float, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Put the delta FILE on BASE and write the checkpoint to OUT."""
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.putting import apply as run

        result = run(base, file, out, scale=scale, progress=progress, **options)
    _tell(result, quiet, as_json)


@delta.command()
@click.argument("tuned")
@click.argument("file")
@click.argument("out")
@_writing
def revert(tuned: str, file: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Take the delta FILE off TUNED and write what was before, byte for byte, to OUT."""
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.putting import revert as run

        result = run(tuned, file, out, progress=progress, **options)
    _tell(result, quiet, as_json)


@delta.command()
@click.argument("file")
@settings.as_json
def info(file: str, as_json: bool) -> None:
    """Say what the delta FILE changes, how much, and of what."""
    from mergekit_ft.deltas import telling

    report = telling.info(file)
    if as_json:
        printing.json_of(report)
    else:
        printing.lines(telling.lines(report))


def _tell(result: Any, quiet: bool, as_json: bool) -> None:
    if as_json:
        names = ("tensors", "bytes_read", "bytes_written", "notes", "receipt")
        printing.json_of(
            {"out": str(result.out), **{name: getattr(result, name) for name in names}}
        )
    elif not quiet:
        printing.lines([*(f"note: {note}" for note in result.notes), f"{result.out}: written"])
