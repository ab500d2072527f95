"""The commands that make, put on, take off and tell of deltas."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.extracting import compose, extract

FORMATS = ("composable-sft", "shira", "sara", "delta")


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
    "--threshold", type=click.FloatRange(0), default=0.4, show_default=True, help="Of TALL masks."
)
@_writing
def pack(
    base: str, tasks: tuple[str, ...], out: str, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Write tuned models as one pack: a vector, a bit an entry and a number for each."""
    named = dict(task.partition("=")[::2] for task in tasks)
    if not all(named.values()) or "" in named or len(named) < len(tasks):
        raise click.UsageError("each task is written NAME=MODEL, under a name of its own")
    options.pop("resume")
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.packing import pack as run

        made = run(base, named, out, progress=progress, **options)
    if as_json:
        printing.json_of({**asdict(made), "out": str(made.out)})
    elif not quiet:
        from mergekit_ft.inspection.tables import size

        told = (f"{t}: scale {s:.6g}, {made.shares[t]:.1%} kept" for t, s in made.scales.items())
        whole = f"the tuned tensors themselves take {size(made.dense)}"
        printing.lines([*told, f"{out}: {size(made.nbytes)}; {whole}"])


@delta.command()
@click.argument("file")
@click.argument("task")
@click.argument("out")
@click.option("--base", required=True, help="The model that the pack was made for.")
@_writing
def unpack(
    file: str, task: str, out: str, base: str, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Write the model of one TASK of the pack FILE to OUT."""
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.packing import unpack as run

        result = run(file, task, out, base=base, progress=progress, **options)
    _tell(result, quiet, as_json)


@delta.command()
@click.argument("source")
@click.argument("out")
@click.option("--from", "of", type=click.Choice(FORMATS), required=True, help="What SOURCE is.")
@click.option("--to", type=click.Choice(FORMATS), required=True, help="What OUT becomes.")
@click.option("--base", help="The model that the delta is of; needed --to delta.")
@click.option("--exact", is_flag=True, help="Store what comes out, rounded, and what was there.")
@click.option("--threshold", type=float, help="Of SaRA's training, where its file does not say.")
@click.option(
    "--order",
    type=click.Path(exists=True, dir_okay=False),
    help="For SaRA: a file of parameter names in the model's order, one a line.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@settings.offline
@settings.as_json
def convert(source: str, out: str, as_json: bool, **options: Any) -> None:
    """Convert a delta of composable-sft, SHiRA or SaRA to a delta file, or the other way."""
    from mergekit_ft.deltas.convert import convert as run

    made = run(source, out, **options)
    if as_json:
        printing.json_of({**asdict(made), "out": str(made.out)})
    else:
        told = f"{made.tensors} tensors, {made.entries:,} entries, {made.whole} whole"
        notes = (f"note: {note}" for note in made.notes)
        printing.lines([*notes, f"{out}: {told}; read again as it was meant"])


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
