"""The commands that tell of the methods, and of what a plan may say."""

from __future__ import annotations

import click

from mergekit_ft import registry
from mergekit_ft.cli import printing, settings


@click.command()
@settings.as_json
def methods(as_json: bool) -> None:
    """List the methods."""
    found = [
        {"name": name, "kind": registry.kind(name), "summary": registry.summary(name)}
        for name in registry.names()
    ]
    if as_json:
        printing.json_of(found)
        return
    width, other = (max(len(entry[key]) for entry in found) for key in ("name", "kind"))
    printing.lines(
        f"{e['name'].ljust(width)}  {e['kind'].ljust(other)}  {e['summary']}" for e in found
    )


@click.command()
@click.argument("method")
def card(method: str) -> None:
    """Print the card of METHOD: what it computes, its parameters, where they come from."""
    click.echo(registry.card(method).rstrip("\n"))


@click.command()
def schema() -> None:
    """Print the JSON Schema of a plan, with every method's parameters."""
    from mergekit_ft.plan import schema as of_plan

    printing.json_of(of_plan())
