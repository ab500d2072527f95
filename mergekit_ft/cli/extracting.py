"""The commands that make deltas from models and from one another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings

if TYPE_CHECKING:
    from mergekit_ft.deltas.compose import Composed
    from mergekit_ft.deltas.extract import Extracted

SHOWN = 8  # tensors named in a report before "and N more"


@click.command(
    epilog="Example: mergekit-ft delta extract ./base ./tuned d.safetensors --density 0.01"
)
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@click.option("--density", type=float, help="Keep this share of the entries, the largest changes.")
@click.option("--k", type=int, help="Keep this many entries, the largest changes.")
@click.option(
    "--scope",
    type=click.Choice(["model", "tensor"]),
    default="model",
    show_default=True,
    help="Rank entries within the whole model, or within each tensor.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors of such names.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors of such names.")
@click.option("--dense", multiple=True, metavar="GLOB", help="Store such tensors whole: a head.")
@settings.making
@click.option("--allow-non-finite", is_flag=True, help="Let NaN and Inf pass.")
def extract(base: str, tuned: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write what TUNED changes in BASE to the delta file OUT: all that differs, or the largest.

    Entries are stored with the values of both, so that the delta goes on and comes off to the bit.
    Tensors that are new, or of another shape, are stored whole.
    """
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.extract import extract as run

        found = run(base, tuned, out, progress=progress, **options)
    if as_json:
        printing.json_of(_summary(found))
    elif not quiet:
        printing.lines(_extracted(found))


@click.command(
    epilog="Example: mergekit-ft delta compose de.safetensors=0.7 qa.safetensors out.safetensors"
)
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA[=WEIGHT]...")
@click.argument("out")
@click.option("--head", help="The member whose whole tensors (a head) are taken.")
@click.option("--base", help="Make values that replace those of this model, not a sum to add.")
@click.option(
    "--memory", type=settings.SIZE, default="1GiB", show_default=True, help="Bytes for sums."
)
@settings.offline
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@click.option("--allow-non-finite", is_flag=True, help="Let NaN and Inf pass.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def compose(deltas: tuple[str, ...], out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write the weighted sum of deltas to OUT, one delta; their order moves no byte."""
    terms = [_term(word) for word in deltas]
    with printing.watched(quiet) as progress:
        from mergekit_ft.deltas.compose import compose as run

        found = run(terms, out, progress=progress, **options)
    if as_json:
        printing.json_of(_summary(found))
    elif not quiet:
        printing.lines(_composed(found))


def _term(word: str) -> tuple[str, float]:
    """Return a delta and its weight; a file that is named like that is one without."""
    path, given, weight = word.rpartition("=")
    if not given or Path(word).exists():
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise click.UsageError(f"{word}: the weight {weight!r} is no number") from None


def _composed(found: Composed) -> Iterator[str]:
    from mergekit_ft.inspection.tables import count, size, table

    yield from (f"note: {note}" for note in found.notes)
    tensors = count(len(found.tensors), "tensor")
    yield f"{found.out}: {found.entries:,} entries, {tensors}, {size(found.nbytes)}"
    rows = [
        (m["delta"], f"{m['weight']:g}", f"{m['entries']:,}", _percent(m["energy"]))
        for m in found.members
    ]
    yield from table(("member", "weight", "entries", "share of energy"), rows)
    met = [
        (" and ".join(m["members"]), f"{m['shared']:,}", f"{m['sign_conflicts']:,}")
        for m in found.meetings
    ]
    if met:
        yield from table(("both change", "entries", "in opposite directions"), met)
    yield f"energy of the sum to that of its members: {_percent(found.energy)}"
    if found.whole:
        yield f"taken whole from {found.head}: {', '.join(found.whole[:SHOWN])}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _summary(found: Extracted | Composed) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "out": str(found.out)}


def _extracted(found: Extracted) -> Iterator[str]:
    from mergekit_ft.inspection.tables import count, size

    yield from (f"note: {note}" for note in found.notes)
    share = found.entries / found.considered if found.considered else 0.0
    yield (
        f"{found.out}: {found.entries:,} of {found.considered:,} entries ({share:.3%}), "
        f"{count(len(found.tensors), 'tensor')}, {size(found.nbytes)}; "
        f"{count(found.unchanged, 'tensor')} unchanged"
    )
    if found.threshold is not None:
        yield f"kept are changes of {found.threshold:.6g} and more"
    if found.energy is not None:
        yield f"energy kept: {found.energy:.2%} of the squared norm of all changes"
    names = list(found.whole)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"stored whole: {', '.join(names[:SHOWN])}{more}"
