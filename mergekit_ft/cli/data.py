"""The commands that choose rows, and rebuild them, before a model is tuned on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.models.speaker import ModelSpeaker

rows = click.option(
    "--rows",
    type=click.Choice(("auto", "raw", "chat")),
    default="auto",
    show_default=True,
    help="Prompts as a chat or as they are; auto: chat where the model has a template.",
)
batch = click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Rows at a time."
)
precision = click.option(
    "--precision",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Of weights and products.",
)
device = click.option(
    "--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")
quiet = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


@click.group()
def data() -> None:
    """Choose rows of JSONL for a model to be tuned on, or rebuild their answers."""


@data.command(
    epilog="Example: mergekit-ft data select ./base rows.jsonl some.jsonl --count 500 "
    "--report first.json"
)
@click.argument("model")
@click.argument("files", nargs=-1, required=True, metavar="ROWS.jsonl...")
@click.argument("out", metavar="OUT.jsonl")
@click.option("--count", type=click.IntRange(1), required=True, help="Rows to draw.")
@click.option("--clusters", type=click.IntRange(1), help="Else by the best silhouette.")
@click.option("--quality", metavar="KEY", help="A number in each row: the higher the sooner.")
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, help="What quality is divided by."
)
@click.option("--max-length", type=click.IntRange(2), default=1024, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--report", type=click.Path(), help="Write clusters and what was drawn, as JSON.")
@click.option("--after", metavar="REPORT.json", help="Go on from an earlier round; needs --gains.")
@click.option(
    "--gains", metavar="FILE.jsonl", help='Of each row drawn in that round: {"gain": number}.'
)
@rows
@batch
@precision
@device
@overwrite
@settings.offline
@quiet
@settings.as_json
def select(
    model: str,
    files: tuple[str, ...],
    out: str,
    count: int,
    report: str | None,
    after: str | None,
    gains: str | None,
    precision: str,
    device: str,
    overwrite: bool,
    offline: bool,
    quiet: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw rows of all kinds, the better ones sooner (kMQ).

    Rows are clustered by k-means of MODEL's own last hidden states, meaned over prompt and answer.
    Every cluster gives rows by its size, and within it they are drawn by softmax of their quality,
    none twice. Rows are written as they stand, the key of their quality left out. A later round
    (--after, --gains) draws from the rest, more of clusters that gained more.
    """
    from mergekit_ft.data.selecting import select as run

    _require_room(out, report, overwrite=overwrite)
    before = None if after is None else _report(after)
    told_by = (gains,) if gains else ()
    with printing.watched(quiet, "row") as progress:
        speaker = _speaker(model, device, precision, offline)
        more: Any = {"after": before, "gains": told_by, "progress": progress, **asked}
        made = run(speaker, files, count, **more)
    told = made.report
    _write(out, made.lines, overwrite)
    _write(report, [json.dumps(told, indent=1)], overwrite)
    if as_json:
        printing.json_of({"out": out, **told})
    elif not quiet:
        click.echo(
            f"{out}: {len(made.lines):,} of {told['rows']:,} rows, of {len(told['budgets'])} "
            f"clusters (silhouette {told['silhouette']:.2f}), round {told['round']}"
        )


@data.command(
    epilog="Example: mergekit-ft data rebuild ./base rows.jsonl own.jsonl "
    "--judge 'regex:#### (-?[0-9]+)'"
)
@click.argument("model")
@click.argument("files", nargs=-1, required=True, metavar="ROWS.jsonl...")
@click.argument("out", metavar="OUT.jsonl")
@click.option(
    "--judge",
    "judged",
    required=True,
    metavar="JUDGE",
    help="exact, normalised, regex:PATTERN, python:MODULE:FUNCTION or command:WORDS.",
)
@click.option(
    "--judge-seconds",
    "seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="A command may take, an answer.",
)
@click.option("--paraphrase", type=click.Path(), help="A file: the prompt that asks for an answer.")
@click.option("--no-paraphrase", is_flag=True, help="Ask for own answers alone.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help=r"Ends an answer; \n is a line's end.")
@click.option("--tried", type=click.Path(), help="Write all that the model said, as JSONL.")
@rows
@batch
@precision
@device
@overwrite
@settings.offline
@quiet
@settings.as_json
def rebuild(
    model: str,
    files: tuple[str, ...],
    out: str,
    judged: str,
    seconds: float,
    paraphrase: str | None,
    no_paraphrase: bool,
    stop: tuple[str, ...],
    tried: str | None,
    precision: str,
    device: str,
    overwrite: bool,
    offline: bool,
    quiet: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Let MODEL answer rows in its own words, and keep those that are right (S3FT).

    Of each row of prompt and completion: MODEL's greedy answer if the judge finds it right; else
    the completion as MODEL says it again, if that is right; else the completion. A command gets
    {prompt, answer, completion} as JSON on stdin and ends with 0 for right, or with 1 and nothing
    on stderr for wrong; a function gets the three as texts and says True or False.
    """
    from mergekit_ft.data.judges import judge_of
    from mergekit_ft.data.rebuilding import rebuild as run

    _require_room(out, tried, overwrite=overwrite)
    ends = [text.replace("\\n", "\n") for text in stop]
    judge, asking = judge_of(judged, seconds), _asking(paraphrase, no_paraphrase)
    with printing.watched(quiet, "answer") as progress:
        speaker = _speaker(model, device, precision, offline)
        more: Any = {"paraphrase": asking, "stop": ends, "progress": progress, **asked}
        made = run(speaker, files, judge, **more)
    _write(out, made.lines, overwrite)
    _write(tried, [json.dumps(one, ensure_ascii=False) for one in made.tried], overwrite)
    told = made.report()
    if as_json:
        printing.json_of({"out": out, **told})
    elif not quiet:
        click.echo(
            f"{out}: of {told['rows']:,} rows {told['own']:,} are answered in the model's own "
            f"words, {told['paraphrase']:,} are paraphrases by it, {told['gold']:,} stayed"
        )


def _asking(paraphrase: str | None, no_paraphrase: bool) -> str | None:
    """Return the prompt that asks for an answer again; None: none does."""
    from mergekit_ft.data.rebuilding import PARAPHRASE

    if paraphrase and no_paraphrase:
        raise click.UsageError("--paraphrase has no effect beside --no-paraphrase")
    if no_paraphrase:
        return None
    return PARAPHRASE if paraphrase is None else _text(paraphrase)


def _require_room(*paths: str | None, overwrite: bool) -> None:
    from mergekit_ft.reports import require_room

    for path in paths:
        if path:
            require_room(Path(path), overwrite=overwrite)


def _write(path: str | None, lines: list[str], overwrite: bool) -> None:
    from mergekit_ft.reports import write

    if path:
        write(Path(path), "".join(f"{line}\n" for line in lines), overwrite=overwrite)


def _speaker(model: str, device: str, precision: str, offline: bool) -> ModelSpeaker:
    import torch

    from mergekit_ft.models.opening import open_speaker
    from mergekit_ft.options import Options
    from mergekit_ft.resolution.opening import reference_of

    where = Options(device=device).torch_device
    dtype = getattr(torch, precision)
    return open_speaker(reference_of(model), device=where, dtype=dtype, offline=offline)


def _report(path: str) -> Any:
    from mergekit_ft.errors import SourceError

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{path}: is no report of `data select`")
    return found


def _text(path: str) -> str:
    from mergekit_ft.errors import SourceError

    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
