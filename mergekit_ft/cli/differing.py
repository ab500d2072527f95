"""The command that compares two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.group import DIFFERENT
from mergekit_ft.cli.picturing import Pictures, pictures

if TYPE_CHECKING:
    from mergekit_ft.inspection.diff import Diff, Line

PARTS = ("names", "shapes", "dtypes", "layout", "config", "tokenizer", "files")
SORTS = ("relative_norm", "cosine", "changed_share", "sign_agreement", "largest", "name")
TOP = 20  # tensors listed


@click.command(epilog="Example: mergekit-ft diff ./base ./tuned --stats")
@click.argument("a")
@click.argument("b")
@click.option("--stats", is_flag=True, help="Read the weights too, and say how far they moved.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors of such names.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors of such names.")
@click.option(
    "--ignore", multiple=True, type=click.Choice(PARTS), help="Leave out such differences."
)
@click.option("--sort", type=click.Choice(SORTS), help="Tensors that differ most in this first.")
@click.option("--top", type=click.IntRange(0), help=f"Tensors listed: {TOP}; with --json all.")
@click.option(
    "--memory", type=settings.SIZE, default="1GiB", show_default=True, help="Bytes for blocks."
)
@click.option("--threads", type=click.IntRange(1), help="Workers; one a core, at most 8.")
@pictures
@click.option(
    "--measure", type=click.Choice(SORTS[:-1]), help="Drawn by --plot; else relative_norm."
)
@settings.offline
@settings.allow_pickle
@click.option("--quiet", is_flag=True, help="Print nothing: the exit code says it.")
@settings.as_json
def diff(
    a: str,
    b: str,
    sort: str | None,
    top: int | None,
    report: str | None,
    plot: str | None,
    measure: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Say in what checkpoint B differs from checkpoint A; exit 1 where it does.

    A and B are folders, files of tensors, hub ids, MODEL+ADAPTER, or '{model: M, delta: FILE}'.
    Without --stats only headers and side files are read: names, shapes, dtypes, which file holds
    what, keys of config.json, tokenizers. Weights count as equal unread only where both are the
    same files, or their recorded SHA-256 are equal.
    """
    from mergekit_ft.inspection import diff as room

    idle = {"--sort": sort, "--top": top, "--plot": plot, "--measure": measure}
    _require_stats(asked["stats"], idle)
    if measure and not plot:
        raise click.UsageError("--measure says what --plot draws; name its file")
    files = Pictures(report, plot, overwrite)
    files.require_room()
    words = ("stats", "include", "exclude", "ignore")
    wanted = room.Asked(**{word: asked.pop(word) for word in words})
    with printing.watched(quiet or not wanted.stats) as progress:
        made = room.diff(a, b, wanted, progress=progress, **asked)
    ranked = room.ranked(made.lines, sort or "relative_norm")
    if files:
        _draw(files, made, ranked[:top], measure)
    if not quiet:
        _print(made, ranked, top, as_json)
    click.get_current_context().exit(DIFFERENT if made.different else 0)


def _draw(files: Pictures, made: Diff, lines: list[Line], measure: str | None) -> None:
    """Write the page and the chart that were asked for."""
    from mergekit_ft.inspection import diff_page

    part, name = diff_page.drawn(made, measure or "relative_norm")
    files.write(diff_page.report(made, lines), part, name)


def _require_stats(stats: bool, given: dict[str, Any]) -> None:
    """Refuse options that have no effect on headers."""
    idle = [option for option, value in given.items() if value is not None]
    if idle and not stats:
        raise click.UsageError(f"{', '.join(idle)}: without --stats no weight is read; add it")


def _print(made: Diff, ranked: list[Line], top: int | None, as_json: bool) -> None:
    if as_json:
        from mergekit_ft.inspection.diff import report

        printing.json_of(report(made, ranked[:top]))
    else:
        from mergekit_ft.inspection.diff_text import lines

        moved = [line for line in ranked if line.totals.changed]
        printing.lines(lines(made, moved[: TOP if top is None else top]))
