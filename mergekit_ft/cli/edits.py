"""The commands about files of edits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.picturing import Pictures, pictures

if TYPE_CHECKING:
    from mergekit_ft.editing.lint import Lint
    from mergekit_ft.editing.scores import Scores

SHOWN = 20  # findings of a kind that are printed

template = click.option(
    "--template",
    type=click.Choice(("raw", "chat")),
    default="raw",
    show_default=True,
    help="Prompts as they are, or as a user's turn.",
)
batch = click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Prompts at a time."
)


@click.group()
def edits() -> None:
    """Look through files of edits, convert them, or ask models about them.

    A file is JSONL or a JSON list of {prompt, target, rephrase, locality, portability, subject,
    weight, id}, of which prompt and target are needed, or of the layouts that ZsRE, CounterFact,
    WikiBigEdit and KnowEdit are published in, which their keys tell.
    """


@edits.command(epilog="Example: mergekit-ft edits lint edits.jsonl --model ./base --known")
@click.argument("files", nargs=-1, required=True)
@click.option("--model", help="Whose tokenizer cuts the edits; else texts alone are looked at.")
@click.option("--known", is_flag=True, help="Ask the model which edits it knows already.")
@template
@batch
@click.option("--strict", is_flag=True, help="Fail, with exit code 4, where anything is found.")
@settings.offline
@settings.as_json
def lint(
    files: tuple[str, ...],
    model: str | None,
    known: bool,
    template: Any,
    batch: int,
    strict: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Tell what is wrong with edits before anything is trained on them.

    Conflicting and repeated prompts, targets that decoding cannot reach or that are empty, blanks
    and tokens that do not join well, subjects that do not occur, prompts that are to be kept and
    are changed.
    """
    from mergekit_ft.editing.facts import read_edits
    from mergekit_ft.errors import SourceError

    if model is None and (known or template == "chat"):
        raise click.UsageError("--known and --template are about a model: name it by --model")
    found = _linted(read_edits(files), model, known, template, batch, offline)
    if as_json:
        printing.json_of(found.report())
    else:
        _print(found)
    if strict and found.findings:
        raise SourceError(f"{len(found.findings)} findings in {found.edits} edits, and --strict")


def _linted(
    found: Any, model: str | None, known: bool, template: Any, batch: int, offline: bool
) -> Lint:
    from mergekit_ft.editing.encoding import Encoder
    from mergekit_ft.editing.lint import lint as run

    if model is None:
        return run(found)
    from mergekit_ft.models.opening import around, open_speaker
    from mergekit_ft.resolution.opening import reference_of

    reference = reference_of(model)
    if known:
        speaker = open_speaker(reference, offline=offline)
        encoder = Encoder(speaker.tokenizer, template)
        return run(found, encoder, most=speaker.most, speaker=speaker, batch=batch)
    source, tokenizer = around(reference, offline=offline)
    most = (source.config or {}).get("max_position_embeddings")
    return run(found, Encoder(tokenizer, template), most=most)


def _print(found: Lint) -> None:
    from mergekit_ft.editing.lint import KINDS
    from mergekit_ft.inspection.tables import count

    for kind, times in found.counts.items():
        click.echo(f"{kind} ({times}): {KINDS[kind]}")
        shown = [finding for finding in found.findings if finding.kind == kind]
        printing.lines(f"  {f.where}{f': {f.more}' if f.more else ''}" for f in shown[:SHOWN])
        if times > SHOWN:
            click.echo(f"  ... and {times - SHOWN} more")
    total = count(len(found.findings), "finding") if found.findings else "nothing to tell"
    click.echo(f"{count(found.edits, 'edit')}: {total}")


@edits.command(epilog="Example: mergekit-ft edits convert counterfact.json edits.jsonl")
@click.argument("files", nargs=-1, required=True)
@click.argument("out", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def convert(files: tuple[str, ...], out: str, overwrite: bool) -> None:
    """Write the edits of FILES as JSONL of our keys."""
    from mergekit_ft.editing.facts import read_edits, words_of
    from mergekit_ft.reports import require_room, write

    require_room(Path(out), overwrite=overwrite)
    found = read_edits(files)
    lines = [json.dumps(words_of(edit), ensure_ascii=False) + "\n" for edit in found]
    write(Path(out), "".join(lines), overwrite=overwrite)
    click.echo(f"{out}: {len(found)} edits")


@edits.command(epilog="Example: mergekit-ft edits score base '{model: base, delta: p}' edits.jsonl")
@click.argument("before")
@click.argument("after")
@click.argument("files", nargs=-1, required=True)
@template
@click.option("--neutral", type=click.Path(), help='JSONL rows {"text": ...}; else a text of ours.')
@batch
@click.option("--answers", type=click.Path(), help="Write prompts, answers, verdicts as JSONL.")
@pictures
@click.option(
    "--precision",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Of products; weights are first as they are stored.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@settings.offline
@settings.allow_pickle
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def score(
    before: str,
    after: str,
    files: tuple[str, ...],
    answers: str | None,
    report: str | None,
    plot: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask the models BEFORE and AFTER an edit about it.

    A model is a folder, a hub id, MODEL+ADAPTER, or '{model: M, delta: FILE}', as it is stored.
    Reliability, generalization, portability and locality are of free greedy decoding;
    teacher-forced figures say so. That nothing changed at all is an error.
    """
    from mergekit_ft.editing.page import heat_map, lines
    from mergekit_ft.editing.page import report as page
    from mergekit_ft.editing.scores import require_changed
    from mergekit_ft.reports import require_room, write

    files_of = Pictures(report, plot, overwrite and bool(report or plot or not answers))
    files_of.require_room()
    if answers:
        require_room(Path(answers), overwrite=overwrite)
    found = _scored(before, after, files, quiet, **options)
    require_changed(found)
    if answers:
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found.answers)
        write(Path(answers), text, overwrite=overwrite)
    if files_of:
        files_of.write(page(found), heat_map(found), "share")
    if as_json:
        printing.json_of(found.report())
    elif not quiet:
        printing.lines(lines(found))


def _scored(
    before: str,
    after: str,
    files: tuple[str, ...],
    quiet: bool,
    *,
    template: Any,
    neutral: str | None,
    batch: int,
    precision: str,
    device: str,
    **opening: Any,
) -> Scores:
    """Read edits and texts, name the models, and ask them one after the other."""
    import torch

    from mergekit_ft.data.rows import SHAPES, read_rows
    from mergekit_ft.editing.examining import questions
    from mergekit_ft.editing.facts import read_edits
    from mergekit_ft.editing.scores import scores
    from mergekit_ft.models.opening import open_speaker
    from mergekit_ft.options import Options
    from mergekit_ft.resolution.opening import reference_of

    told = read_edits(files)
    text = None if neutral is None else read_rows([neutral], {"text": SHAPES["text"]})
    where = {"device": Options(device=device).torch_device, "dtype": getattr(torch, precision)}
    models = [reference_of(words) for words in (before, after)]
    opened = [partial(open_speaker, model, **where, **opening) for model in models]
    with printing.watched(quiet, "question") as progress:
        if progress is not None:
            progress.start(2 * len(questions(told)), "asking before and after")
        watch = progress.advance if progress is not None else lambda done: None
        kinds: Any = {"template": template, "neutral": text, "batch": batch, "watch": watch}
        return scores(opened[0], opened[1], told, **kinds)
