"""The command that trains."""

from __future__ import annotations

from typing import Any

import click

from mergekit_ft.cli import printing, settings


@click.command(epilog="An interrupted training leaves OUT.work, which --resume goes on from.")
@click.argument("plan")
@click.argument("out")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--resume", is_flag=True, help="Go on with what a stopped run left in OUT.work.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@settings.offline
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def tune(plan: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Train by PLAN (a file, or - for stdin) and write what was learned to OUT."""
    given = printing.plan_of(plan)
    from mergekit_ft.tuning import tune as run

    show = "nothing" if quiet else "json" if as_json else "lines"
    made = run(given, out, show=show, **options)
    if as_json:
        printing.json_of({"out": str(made.out), "facts": made.facts, "notes": made.notes})
    elif not quiet:
        told = (f"{key.replace('_', ' ')} {value}" for key, value in made.facts.items())
        printing.lines([*(f"note: {note}" for note in made.notes), f"{out}: {', '.join(told)}"])
