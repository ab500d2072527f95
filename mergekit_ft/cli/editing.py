"""The command that edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.picturing import Pictures

if TYPE_CHECKING:
    from mergekit_ft.editing.run import Edited

EXAMPLES = """Examples: mergekit-ft edit ./model edits.jsonl patch.safetensors --layer 22

mergekit-ft edit ./model edits.jsonl patch.safetensors --method memit --statistics text.txt

mergekit-ft edit plan.yaml patch.safetensors

`mergekit-ft edits score` asks about the edits before and after, `delta apply` puts the patch on,
`delta revert` takes it off."""


@click.command(epilog=EXAMPLES)
@click.argument("words", nargs=-1, required=True, metavar="(BASE EDITS | PLAN) OUT")
@click.option("--method", help="locft_bf, rome, memit or alphaedit.  [default: locft_bf]")
@click.option(
    "--layer", metavar="N|auto|search", help="That is written.  [default: auto, by depth]"
)
@click.option("--module", help="Of it: down_proj, mlp, attention, layer, a pattern of names.")
@click.option("--set", "given", multiple=True, metavar="KEY=VALUE", help="Another parameter.")
@click.option("--statistics", metavar="TEXT", help="Text the model knows; of those that solve.")
@click.option("--template", type=click.Choice(("raw", "chat")), help="How it will be asked.")
@click.option("--extend", type=click.Path(), help="A patch, whose edits are taught again.")
@click.option("--seed", type=int, help="Of all that is drawn.  [default: 0]")
@click.option(
    "--output",
    "--out",
    type=click.Choice(("delta", "checkpoint")),
    help="What OUT is.  [default: delta, a patch]",
)
@click.option(
    "--link", is_flag=True, help="Of a checkpoint: hard-link files that stay the base's own."
)
@click.option("--evaluate", is_flag=True, help="Ask about the edits before and after.")
@click.option("--report", type=click.Path(), help="Of --evaluate: write an HTML page.")
@click.option("--plot", type=click.Path(), help="Of --evaluate: draw a chart, .png or .svg.")
@click.option(
    "--memory",
    type=settings.SIZE,
    default="1GiB",
    show_default=True,
    help="For what is kept of the texts; more goes into a file.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@settings.offline
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def edit(
    words: tuple[str, ...],
    method: str | None,
    layer: str | None,
    module: str | None,
    given: tuple[str, ...],
    statistics: str | None,
    template: str | None,
    extend: str | None,
    seed: int | None,
    output: str | None,
    evaluate: bool,
    report: str | None,
    plot: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the facts of EDITS into the model BASE, as the patch OUT, or as a checkpoint.

    The patch is a delta file: the few tensors that changed, of which base, and the edits. PLAN is
    the same in words, a YAML file or - for stdin. A run that is stopped leaves nothing; run again
    it gives the same patch.
    """
    flags = {"statistics": statistics, "template": template, "extend": extend, "seed": seed}
    flags["output"] = output
    flags = {key: value for key, value in flags.items() if value is not None}
    plan = _plan(words, method, layer, module, given, flags)
    pictures = Pictures(report, plot, overwrite and bool(report or plot))
    if pictures and not evaluate:
        raise click.UsageError("--report and --plot are of what --evaluate finds")
    pictures.require_room()
    from mergekit_ft.editing.run import edit as run

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    made = run(plan, words[-1], say=say, evaluate=evaluate, overwrite=overwrite, **options)
    _draw(made, pictures)
    if as_json:
        told = {"out": str(made.out), "bytes": made.nbytes, "tensors": made.tensors}
        printing.json_of({**told, **made.facts, "notes": made.notes})
    elif not quiet:
        printing.lines(_lines(made))


def _draw(made: Edited, pictures: Pictures) -> None:
    from mergekit_ft.editing import page

    if made.scores is not None and pictures:
        pictures.write(page.report(made.scores), page.heat_map(made.scores), "share")


def _lines(made: Edited) -> Iterator[str]:
    from mergekit_ft.editing import page

    said = made.facts["teacher_forced"]["stored"]
    yield from (f"note: {note}" for note in made.notes)
    if made.scores is not None:
        yield from page.lines(made.scores)
    yield (
        f"{made.out}: {', '.join(made.tensors)}; {made.nbytes / 2**20:.1f} MiB; {said:.0%} of "
        f"{made.facts['edits']} edits are said whole, each token after the right ones before it"
    )


def _plan(
    words: tuple[str, ...],
    method: str | None,
    layer: str | None,
    module: str | None,
    given: tuple[str, ...],
    flags: dict[str, Any],
) -> Any:
    """Return the plan, or what the flags say as one."""
    parameters = dict(_pair(pair) for pair in given)
    if layer is not None and layer != "auto":
        parameters["layer"] = _value(layer)
    if module is not None:
        parameters["module"] = module
    if len(words) == 2:
        if method or layer or module or given or flags:
            raise click.UsageError("a plan says it all: write these options into it")
        return printing.plan_of(words[0])
    if len(words) != 3:
        raise click.UsageError("give BASE EDITS OUT, or PLAN OUT")
    base, edits, _ = words
    return {"base": base, "edits": edits, "editor": {method or "locft_bf": parameters}, **flags}


def _pair(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise click.UsageError(
            f"--set {pair}: write KEY=VALUE, such as learning_rate=2e-3 or layers=[4,5]"
        )
    return key, _value(value)


def _value(text: str) -> Any:
    """Return a number where it is one, as YAML has it, 2e-3 included; or a list of them."""
    if text.startswith("[") and text.endswith("]"):
        return [_value(item.strip()) for item in text[1:-1].split(",")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    words = {"null": None, "none": None, "true": True, "false": False}
    return words.get(text, text)
