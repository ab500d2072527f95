"""The commands that make adapters: from a tuned model, and from other adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_ft.cli import printing, settings


@click.group()
def lora() -> None:
    """Make LoRA adapters: extract one from a tuned model, merge several into one."""


@lora.command()
@click.argument("base")
@click.argument("tuned")
@click.argument("out", type=click.Path())
@click.option("--rank", type=click.IntRange(1), help="Of every matrix; with --energy, at most.")
@click.option("--energy", type=float, help="Share of each matrix's squared norm to keep: 0.95.")
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomised"]),
    default="auto",
    show_default=True,
    help="The whole spectrum, or a sketch of the --rank largest part; auto: by size.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors of such names.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors of such names.")
@click.option(
    "--others",
    type=click.Choice(["save", "skip", "refuse"]),
    default="save",
    show_default=True,
    help="Changed norms, embeddings, biases: keep whole, leave out, or stop.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sketches.")
@click.option(
    "--memory", type=settings.SIZE, default="4GiB", show_default=True, help="For whole matrices."
)
@click.option("--threads", type=click.IntRange(1), help="Matrices at once; one a core, at most 8.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@settings.offline
@settings.allow_pickle
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def extract(
    base: str,
    tuned: str,
    out: str,
    offline: bool,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Write to OUT the adapter that turns BASE into about TUNED, for peft to load.

    BASE and TUNED are folders or hub ids. For each matrix of a linear layer the difference is
    replaced by the nearest product of low rank; the share of it that is kept is measured from the
    written files and printed, matrix by matrix. One of --rank and --energy must be given.
    """
    from mergekit_ft.lora import extraction, reports
    from mergekit_ft.lora.asked import ExtractAsked
    from mergekit_ft.sources import open_source

    chosen = ExtractAsked(**asked)
    opening: dict[str, Any] = {"offline": offline, "allow_pickle": allow_pickle}
    with (
        printing.watched(quiet) as progress,
        open_source(base, **opening) as first,
        open_source(tuned, **opening) as second,
    ):
        found = extraction.extract(first, second, Path(out), chosen, progress)
    if as_json:
        printing.json_of(found.report)
    elif not quiet:
        printing.lines(reports.lines(found.report))


@lora.command()
@click.argument("adapters", nargs=-1)
@click.argument("out", type=click.Path())
@click.option(
    "--method",
    type=click.Choice(["concat", "svd", "core", "knots"]),
    default="concat",
    show_default=True,
    help="The exact sum; the nearest to it of a rank; an operator, in Core Space or KnOTS'.",
)
@click.option("--weight", "weights", type=float, multiple=True, help="One for all, or one each.")
@click.option("--rank", type=click.IntRange(1), help="Of every module, at most; not with concat.")
@click.option("--energy", type=float, help="Share of the squared norm to keep; not with concat.")
@click.option("--operator", help="With core or knots: any method that `mergekit-ft methods` lists.")
@click.option("--set", "given", multiple=True, metavar="KEY=VALUE", help="Its parameters.")
@click.option(
    "--plan",
    type=click.Path(exists=True, dir_okay=False),
    help="Instead of ADAPTERS and an operator: merge_method, parameters, models, then.",
)
@click.option(
    "--others",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="Tensors held whole that do not add up: stop, or leave them out.",
)
@click.option(
    "--memory", type=settings.SIZE, default="4GiB", show_default=True, help="For the factors."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@settings.offline
@settings.allow_pickle
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def merge(
    adapters: tuple[str, ...],
    out: str,
    plan: str | None,
    given: tuple[str, ...],
    offline: bool,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Merge ADAPTERS (folders or hub ids) into one and write it to OUT.

    What is merged are the changes that they make, scale * B @ A, whatever their ranks, scales and
    target modules; a module that an adapter lacks counts as zero there.
    """
    from mergekit_ft.lora import merging, recipes, reports
    from mergekit_ft.sources import open_adapter

    recipe = recipes.recipe(adapters, plan, given, asked)
    opening: dict[str, Any] = {"offline": offline, "allow_pickle": allow_pickle}
    with printing.watched(quiet) as progress:
        opened = [open_adapter(name, **opening) for name in recipe.adapters]
        report = merging.merge(opened, Path(out), recipe.asked, progress)
    if as_json:
        printing.json_of(report)
    elif not quiet:
        printing.lines(reports.lines(report))
