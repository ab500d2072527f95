"""The commands about files of edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.editing.lint import Lint

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
    """Look through files of edits, or convert them.

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
