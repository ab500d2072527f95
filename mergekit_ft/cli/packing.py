"""The command that makes one pack of several tuned models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.deltas.packing import Packed


@click.command(
    epilog="Example: mergekit-ft delta pack ./base maths=./maths chat=./chat pack.safetensors"
)
@click.argument("base")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK=MODEL...")
@click.argument("out")
@click.option(
    "--method",
    type=click.Choice(["emr", "tall"]),
    default="emr",
    show_default=True,
    help="EMR's elected vector, or the sum with TALL masks.",
)
@click.option(
    "--threshold", type=click.FloatRange(0), help="Of TALL masks; 0.4 if not given. Larger: less."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors of such names.")
@settings.making
def pack(
    base: str, tasks: tuple[str, ...], out: str, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Write tuned models as one pack: a vector, and for each a bit an entry and a number.

    It is smaller than the models are, and `delta unpack` makes one of them again, nearly as it was.
    """
    named = dict(task.partition("=")[::2] for task in tasks)
    if not all(named.values()) or "" in named or len(named) < len(tasks):
        raise click.UsageError("each task is written NAME=MODEL, under a name of its own")
    if options["threshold"] is not None and options["method"] != "tall":
        raise click.UsageError("--threshold is of TALL masks: it needs --method tall")
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.packing import pack as run

        made = run(base, named, out, progress=progress, **options)
    if as_json:
        from dataclasses import asdict

        printing.json_of({**asdict(made), "out": str(made.out)})
    elif not quiet:
        printing.lines(_told(made))


def _told(made: Packed) -> Iterator[str]:
    from mergekit_ft.inspection.tables import size

    yield from (f"note: {note}" for note in made.notes)
    for task, scale in made.scales.items():
        yield f"{task}: scale {scale:.6g}, {made.shares[task]:.1%} kept"
    whole = f"{size(made.dense)}, {made.dense / made.nbytes:.2f} x as much"
    yield f"{made.out}: {size(made.nbytes)}; the tasks' own tensors take {whole}"
