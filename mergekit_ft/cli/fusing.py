"""The commands about models whose logits are fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.fusion import Fit


@click.group()
def fuse() -> None:
    """Fuse what several models say: fit weights for it."""


@fuse.command(epilog="A killed fit leaves OUT.json.work; the same command goes on from there.")
@click.argument("plan")
@click.argument("out", metavar="OUT.json")
@click.option(
    "--cache",
    type=click.Path(file_okay=False),
    help="Keep what the models said in this folder, for other fits; else it is deleted.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.json.")
@settings.offline
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def fit(plan: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Fit by PLAN (a file, or - for stdin) how much each expert moves a model; write OUT.json.

    Every model is asked once about the calibration texts; what it says there is kept on disk. A
    weight for each expert is then found for all domains together, and for each domain with the
    anchor text. `fuse bake` makes a checkpoint of the weights.
    """
    given = printing.plan_of(plan)
    from mergekit_ft.fusion import fit as run

    with printing.watched(quiet, "place") as progress:
        made = run(given, out, progress=progress, **options)
    if as_json:
        printing.json_of({"out": out, **made.weights.report(), "notes": made.notes})
    elif not quiet:
        printing.lines(_fit_lines(made, out))


def _fit_lines(made: Fit, out: str) -> Iterator[str]:
    from mergekit_ft.inspection.tables import size

    yield from (f"note: {note}" for note in made.notes)
    weights, collection = made.weights, made.collection
    told = ", ".join(f"{name} {alpha:.4f}" for name, alpha in weights.alpha.items())
    yield f"weights, all domains: {told}"
    for domain, alphas in weights.alpha_by_domain.items():
        yield f"weights, {domain}: " + ", ".join(f"{n} {a:.4f}" for n, a in alphas.items())
    for domain, parts in made.figures.items():
        for what, figures in parts.items():
            nats = (f"{name} {v:.3f}" for name, v in figures.items() if not name.startswith("kl "))
            yield f"nats a token, {domain}, {what}: {', '.join(nats)}"
    heard = sum(collection.seconds.values())
    speed = f", {collection.shape.places * len(collection.seconds) / heard:,.0f} places/s heard"
    yield (
        f"{out}: {collection.shape.places:,} places of {len(collection.files)} models, "
        f"{size(collection.nbytes)} kept{speed if heard else ''}"
    )
