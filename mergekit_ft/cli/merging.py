"""The commands that carry a plan out, or say what that would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.engine import Result


@click.command(epilog="An interrupted merge leaves OUT.part, which --resume finishes.")
@click.argument("plan")
@click.argument("out")
@settings.merging
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--resume", is_flag=True, help="Finish what a stopped run left in OUT.part.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@click.option("--allow-non-finite", is_flag=True, help="Let NaN and Inf pass.")
@click.option("--allow-unchanged", is_flag=True, help="Accept a result that equals the base.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def merge(plan: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Carry out PLAN (a file, or - for stdin) and write the checkpoint to OUT."""
    given = printing.plan_of(plan)
    with printing.watched(quiet) as progress:
        from mergekit_ft.engine import merge as run

        result = run(given, out, progress=progress, **options)
    if as_json:
        printing.json_of(_summary(result))
    elif not quiet:
        printing.lines(_result_lines(result))


@click.command()
@click.argument("plan")
@settings.merging
@settings.as_json
def check(plan: str, as_json: bool, **options: Any) -> None:
    """Resolve everything in PLAN from headers and say what a merge would do."""
    from mergekit_ft.inspection import check as room
    from mergekit_ft.options import Options

    report, resolution = room.check(printing.plan_of(plan), Options(**options))
    if as_json:
        printing.json_of(report)
    else:
        printing.lines(room.lines(report, resolution))


def _summary(result: Result) -> dict[str, Any]:
    names = ("tensors", "changed", "bytes_read", "bytes_written", "notes", "receipt")
    return {"out": str(result.out), **{name: getattr(result, name) for name in names}}


def _result_lines(result: Result) -> Iterator[str]:
    from mergekit_ft.inspection.tables import count, size

    yield from (f"note: {note}" for note in result.notes)
    yield (
        f"{result.out}: changed {result.changed:,} of {count(result.tensors, 'tensor')}, "
        f"{size(result.bytes_written)}"
    )
