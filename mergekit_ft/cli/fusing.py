"""The commands about models whose logits are fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.fusion import Baked, Fit, Generated

PROMPTS = {"prompt": ("prompt",), "completion": ("prompt", "completion")}  # rows with a prompt
SHOTS = {"completion": ("prompt", "completion")}


@click.group()
def fuse() -> None:
    """Fuse what several models say: fit weights for it, and put them into one checkpoint."""


@fuse.command(epilog="A killed fit leaves OUT.json.work; the same command goes on from there.")
@click.argument("plan")
@click.argument("out", metavar="OUT.json")
@click.option(
    "--cache",
    type=click.Path(file_okay=False),
    help="Keep what the models said in this folder, for other fits; else it is deleted.",
)
@click.option(
    "--memory",
    type=settings.SIZE,
    default="1GiB",
    show_default=True,
    help="A model that takes more in float32 is run layer by layer.",
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
    seconds = collection.seconds
    asked = collection.shape.places * len(seconds)
    speed = f", {asked / sum(seconds.values()):,.0f} places/s heard" if seconds else ""
    yield (
        f"{out}: {collection.shape.places:,} places of {len(collection.files)} models, "
        f"{size(collection.nbytes)} kept{speed}"
    )


@fuse.command(epilog="Nothing is written before the merge was asked about held-out texts.")
@click.argument("weights", metavar="WEIGHTS.json")
@click.argument("out")
@click.option("--domain", help="Take the weights of one domain, not of all together.")
@click.option(
    "--refine/--no-refine",
    default=True,
    show_default=True,
    help="Where the merge is not near, move the coefficients of each tensor.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False),
    help="The folder in which `fuse fit` kept what the models said; else they are asked again.",
)
@click.option("--memory", type=settings.SIZE, default="1GiB", show_default=True, help="For blocks.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@settings.offline
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def bake(weights: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Merge the experts of WEIGHTS.json into their base by the fitted weights; write to OUT.

    The experts' task vectors are added by the weights. The merge is asked about the texts that were
    held out of the fit, beside the fused models; where it is further from them than 0.05 nats and
    a tenth of their way from the base, or needs a tenth more nats than they (above 0.01), the
    coefficients of every tensor are refined.
    """
    from mergekit_ft.fusion import bake as run

    with printing.watched(quiet, "place") as progress:
        made = run(weights, out, progress=progress, **options)
    if as_json:
        told = {"out": out, "alpha": dict(made.alpha), "held_out": made.measured}
        printing.json_of({**told, "before_refining": made.first, "notes": made.notes})
    elif not quiet:
        printing.lines(_bake_lines(made))


def _bake_lines(made: Baked) -> Iterator[str]:
    from mergekit_ft.inspection.tables import count, size

    yield from (f"note: {note}" for note in made.notes)
    for what, found in (("before refining, ", made.first), ("", made.measured)):
        for domain, figures in (found or {}).items():
            told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            yield f"{what}{domain}, held out: {told}"
    result = made.result
    yield (
        f"{result.out}: changed {result.changed:,} of {count(result.tensors, 'tensor')}, "
        f"{size(result.bytes_written)}"
    )


@fuse.command(
    epilog="Example: mergekit-ft fuse generate models.yaml --prompt '2+2=' --rows raw --factors"
)
@click.argument("models", metavar="PLAN | WEIGHTS.json")
@click.argument("data", metavar="[PROMPTS.jsonl]", required=False)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="In place of a file.")
@click.option("--domain", help="Take the fitted weights of one domain, not of all together.")
@click.option(
    "--search", "searched", is_flag=True, help="Search the factors; leave those given aside."
)
@click.option("--shots", metavar="FILE.jsonl", help="Rows of prompt + completion, shown before.")
@click.option(
    "--shots-for",
    "shown",
    type=click.Choice(("all", "base")),
    default="all",
    show_default=True,
    help="Which models see the shots.",
)
@click.option(
    "--rows",
    type=click.Choice(("auto", "raw", "chat")),
    default="auto",
    show_default=True,
    help="Prompts as a chat or as they are; auto: chat where the base has a template.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help=r"Ends an answer; \n is a line's end.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, help="0, the default, is greedy."
)
@click.option("--seed", type=int, help="Of what is drawn.  [default: 0]")
@click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Prompts at a time."
)
@click.option("--factors", is_flag=True, help="Tell what moved each token, and how far.")
@click.option(
    "--precision",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Of weights and products, where a plan's `dtypes` does not say.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@settings.offline
@settings.as_json
def generate(
    models: str,
    data: str | None,
    prompts: tuple[str, ...],
    domain: str | None,
    searched: bool,
    shots: str | None,
    stop: tuple[str, ...],
    factors: bool,
    precision: str,
    device: str,
    offline: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Answer prompts by what several models say together.

    PLAN names `base`, `experts` and what they were tuned from (`small`); each token of base is
    moved as the best expert was by its tuning, as far as that was moved itself, or by the factors
    that PLAN (`alpha`) or a file of `fuse fit` holds. All models are in memory.
    """
    if (data is None) == (not prompts):
        raise click.UsageError("give a file of prompts, or --prompt TEXT")
    _refuse_idle(shots, **asked)
    given = printing.plan_of(models)
    import torch

    from mergekit_ft.data.rows import read_rows
    from mergekit_ft.fusion import fused_models
    from mergekit_ft.fusion import generate as run
    from mergekit_ft.options import Options

    texts = prompts or [row.words["prompt"] for row in read_rows([data or ""], PROMPTS)]
    found = fused_models(
        given,
        domain=domain,
        searched=searched,
        device=Options(device=device).torch_device,
        dtype=getattr(torch, precision),
        offline=offline,
    )
    ends = [text.replace("\\n", "\n") for text in stop]
    before = read_rows([shots], SHOTS) if shots else []
    asked["seed"] = asked["seed"] or 0
    made = run(found, list(texts), stop=ends, shots=before, **asked)
    if as_json:
        printing.json_of([one.report(factors=factors) for one in made])
        return
    for one in made:
        printing.lines(_answer_lines(one, factors))


def _refuse_idle(
    shots: str | None, *, shown: str, temperature: float, seed: int | None, **_: Any
) -> None:
    if shots is None and shown != "all":
        raise click.UsageError("--shots-for is about --shots")
    if seed is not None and not temperature:
        raise click.UsageError("--seed has no effect: at temperature 0 nothing is drawn")


def _answer_lines(one: Generated, factors: bool) -> Iterator[str]:
    yield f"> {one.prompt}"
    yield one.answer.text
    if factors:
        told = (", ".join(f"{n} {a:.2f}" for n, a in f.items()) or "none" for f in one.factors)
        yield f"factors: {'; '.join(told)}"
    yield ""
