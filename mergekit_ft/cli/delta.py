"""The commands that make, put on, take off and tell of deltas."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.extracting import compose, extract
from mergekit_ft.cli.packing import pack

FORMATS = ("composable-sft", "shira", "sara", "delta")


@click.group()
def delta() -> None:
    """Make, apply, revert and look at deltas: changes to a model as small, checked files."""


delta.add_command(extract)
delta.add_command(compose)
delta.add_command(pack)


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


@delta.command(
    epilog="Example: mergekit-ft delta unpack pack.safetensors maths ./maths-again --base ./base"
)
@click.argument("file")
@click.argument("task")
@click.argument("out")
@click.option("--base", help="The model that the pack was made for; needed for a model.")
@_writing
def unpack(
    file: str, task: str, out: str, base: str | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Write the model of one TASK of the pack FILE to OUT.

    Where OUT ends in .safetensors, write what the task adds, as a delta that can be composed.
    """
    if out.endswith(".safetensors"):
        _unpack_delta(file, task, out, base, quiet, as_json, options)
        return
    if base is None:
        raise click.UsageError("a model needs --base; a delta is a file that ends in .safetensors")
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.unpacking import unpack as run

        result = run(file, task, out, base=base, progress=progress, **options)
    _tell(result, quiet, as_json)


def _unpack_delta(
    file: str,
    task: str,
    out: str,
    base: str | None,
    quiet: bool,
    as_json: bool,
    options: Any,
) -> None:
    idle = [word for word in ("threads", "resume", "offline") if options[word]]
    if base is not None or idle:
        raise click.UsageError(
            f"--{idle[0] if idle else 'base'} has no effect where OUT is a delta; a model is a "
            "folder: name one"
        )
    from mergekit_ft.deltas.unpacking import unpack_delta as run

    made = run(file, task, out, overwrite=options["overwrite"])
    if as_json:
        printing.json_of({**asdict(made), "out": str(made.out)})
    elif not quiet:
        printing.lines([f"{out}: {made.entries:,} entries, {made.tensors} tensors"])


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
