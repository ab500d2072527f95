"""The command that measures models on rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.picturing import Pictures, pictures

if TYPE_CHECKING:
    from mergekit_ft.evaluation import Evaluation

DATA = ".jsonl"  # what ends so is data, not a model


@click.command(
    "eval",
    epilog="Example: mergekit-ft eval ./base ./tuned ./base+./adapter orders.jsonl triage.jsonl",
)
@click.argument("models_and_data", nargs=-1, required=True, metavar="MODEL... [DATA.jsonl]...")
@click.option(
    "--task", "named", multiple=True, metavar="NAME=FILE", help="A file of rows, its task named."
)
@click.option(
    "--measure", "measures", multiple=True, metavar="NAME", help="Only this; else all allowed."
)
@click.option(
    "--rows",
    type=click.Choice(("auto", "raw", "chat")),
    default="auto",
    show_default=True,
    help="Prompts as a chat or joined as they are; auto: chat where the model has a template.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first rows of each file.")
@click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Rows at a time."
)
@click.option("--max-length", type=click.IntRange(1), help="Cut rows for loss; else none is.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Of an answer; else as many as the task's longest needs, 32 at least.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help=r"Ends an answer; \n is a line's end.")
@click.option("--chain", is_flag=True, help="The models are stages: task i was learned at stage i.")
@click.option(
    "--harness", metavar="TASK,...", help="Tasks for lm-evaluation-harness, if it is installed."
)
@click.option("--answers", type=click.Path(), help="Write prompts, answers, verdicts as JSONL.")
@pictures
@click.option(
    "--precision",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Of weights and products.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@settings.offline
@settings.allow_pickle
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def evaluate(
    models_and_data: tuple[str, ...],
    named: tuple[str, ...],
    stop: tuple[str, ...],
    harness: str | None,
    answers: str | None,
    report: str | None,
    plot: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure models on rows, side by side.

    What ends in .jsonl is data, all else a MODEL: a folder, a hub id, MODEL+ADAPTER,
    '{model: M, delta: FILE}', a merge plan's .yaml file, which is merged in memory, or fused
    models: a plan of `fuse generate`, or the .json file of `fuse fit`. Each file of rows is a task
    named by its stem. Rows are prompt + completion, messages or text (loss, perplexity,
    token_accuracy; exact_match and exact_match_normalised by greedy decoding), or prompt + choices
    + answer (choice_accuracy, choice_accuracy_per_token); `weight` beside them weighs a row. The
    models are loaded one after the other.
    """
    from mergekit_ft.evaluation import run

    files = Pictures(report, plot, overwrite and bool(report or plot or not answers))
    files.require_room()
    _require_room(answers, overwrite)
    models = [words for words in models_and_data if not words.endswith(DATA)]
    if not models:
        raise click.UsageError(f"no model is named: what ends in {DATA} is data")
    data = _tasks([words for words in models_and_data if words.endswith(DATA)], named)
    with printing.watched(quiet, "row") as progress:
        found = run.evaluate(
            _opened(models, options),
            data,
            stop=[text.replace("\\n", "\n") for text in stop],
            harness=harness.split(",") if harness else (),
            answers=answers is not None,
            progress=progress,
            **options,
        )
    _write(found, files, answers, overwrite)
    if as_json:
        printing.json_of(found.report())
    elif not quiet:
        from mergekit_ft.evaluation.saying import lines

        printing.lines(lines(found))


def _opened(models: list[str], options: dict[str, Any]) -> Any:
    """Return what is measured, by name; fused models as what opens them."""
    import torch

    from mergekit_ft.fusion import fused_models
    from mergekit_ft.options import Options
    from mergekit_ft.plan.fused import is_fused

    def fuses(words: str) -> bool:
        plan = words.endswith((".yaml", ".yml"))
        return words.endswith(".json") or (plan and is_fused(words))

    if not any(map(fuses, models)) or len(set(models)) < len(models):
        return models
    where: dict[str, Any] = {
        "device": Options(device=options["device"]).torch_device,
        "dtype": getattr(torch, options["precision"]),
        "offline": options["offline"],
        "allow_pickle": options["allow_pickle"],
    }
    return {w: fused_models(w, **where).open if fuses(w) else w for w in models}


def _require_room(answers: str | None, overwrite: bool) -> None:
    from mergekit_ft.reports import require_room

    if answers:
        require_room(Path(answers), overwrite=overwrite)


def _tasks(files: list[str], named: tuple[str, ...]) -> dict[str, str]:
    """Return each task's file, by its name: the file's stem, or as it was named."""
    found: dict[str, str] = {}
    pairs = [(Path(file).stem, file) for file in files]
    for item in named:
        name, sign, file = item.partition("=")
        if not (name and sign and file):
            raise click.UsageError(f"--task takes NAME=FILE, not {item!r}")
        pairs.append((name, file))
    for name, file in pairs:
        if name in found:
            raise click.UsageError(
                f"{found[name]} and {file} would both be the task {name!r}: name one of them by "
                "--task NAME=FILE"
            )
        found[name] = file
    return found


def _write(found: Evaluation, files: Pictures, answers: str | None, overwrite: bool) -> None:
    """Write the answers, the page and the chart that were asked for."""
    from mergekit_ft.evaluation import page
    from mergekit_ft.reports import write

    if answers:
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found.answers)
        write(Path(answers), text, overwrite=overwrite)
    if files:
        mapped = page.heat_map(found)
        first = mapped.measures[0].name if mapped is not None else ""
        files.write(page.report(found), mapped, first)
