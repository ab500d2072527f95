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
        {"name": name, "kind": "operator", "summary": registry.summary(name)}
        for name in registry.names()
    ]
    if as_json:
        printing.json_of(found)
        return
    width = max((len(entry["name"]) for entry in found), default=0)
    printing.lines(f"{e['name'].ljust(width)}  {e['kind']}  {e['summary']}" for e in found)


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
