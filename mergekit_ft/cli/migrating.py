"""The command that makes a mergekit plan strict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.errors import PlanError, WriteError


@click.command()
@click.argument("file")
@click.option("-o", "--output", help="Write the plan there; else to stdout.")
@click.option("--overwrite", is_flag=True, help="Replace what stands there.")
@click.option("--block", type=click.IntRange(1), help="Which of a card's plans, from 1.")
@settings.offline
@settings.allow_pickle
@settings.as_json
def migrate(
    file: str, output: str | None, overwrite: bool, as_json: bool, block: int | None, **opening: Any
) -> None:
    """Make FILE strict: a mergekit plan, or a model card that holds one (- for stdin).

    What never had an effect in mergekit is told and goes; what differs here is told.
    """
    from mergekit_ft.inspection import migration as room

    found = room.migrate(printing.plan_of(file), block=block, **opening)
    if as_json:
        printing.json_of(room.as_json(found))
    else:
        for line in room.lines(found):
            click.echo(line, err=True)
    if found.faults:
        raise PlanError(found.faults)
    if output is not None:
        _write(Path(output), found.text, overwrite)
    elif not as_json:
        click.echo(found.text.rstrip("\n"))


def _write(path: Path, text: str, overwrite: bool) -> None:
    try:
        with open(path, "w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise WriteError(
            f"{path} is there already; name another file, or give --overwrite"
        ) from None
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror or error}") from error
