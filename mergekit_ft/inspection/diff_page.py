"""A comparison of two checkpoints as a report: heat maps by layer, steps, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath

from mergekit_ft.algebra.distances import BINS, edges
from mergekit_ft.inspection.comparison import Totals, added_up
from mergekit_ft.inspection.diff import MEASURES, Diff, Line
from mergekit_ft.inspection.diff_text import label, row_text, verdict
from mergekit_ft.reports import Column, HeatMap, Histograms, Measure, Notes, Panel, Report, Table
from mergekit_ft.reports.figures import figure
from mergekit_ft.reports.report import Cell, Part, Scale, Value

ALL = "all"  # layers, or families
OUTSIDE = "outside the layers"
Of = Callable[[Totals], Value]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
MEANINGS: tuple[tuple[str, str, str, Scale, Of], ...] = (
    (
        "relative norm",
        "How long the change is against the weights that it changes: ||B \u2212 A|| / ||A||.",
        "%",
        "log",
        lambda t: t.relative_norm,
    ),
    (
        "1 \u2212 cosine",
        "How far the weights turned: 0 where B points where A does, 1 at a right angle.",
        "",
        "log",
        lambda t: t.turn,
    ),
    (
        "changed",
        "Share of the elements whose stored value is another.",
        "%",
        "linear",
        lambda t: t.changed_share,
    ),
    (
        "sign changed",
        "Share of the elements whose sign is another; zero is a sign of its own.",
        "%",
        "log",
        lambda t: None if t.sign_agreement is None else 1.0 - t.sign_agreement,
    ),
    ("largest change", "The largest |B \u2212 A| of one element.", "", "log", lambda t: t.largest),
)


def report(made: Diff, lines: Sequence[Line]) -> Report:
    """Return a comparison as a page, its tensors in this order."""
    facts = [("A", made.a), ("B", made.b), ("tensors", _counted(made))]
    facts += [(glob, f"{hits:,} tensors") for glob, hits in made.matches.items()]
    parts: list[Part] = []
    if made.stats and made.lines:
        parts += [*heat_maps(made), _steps(made), _families(made), _tensors(lines)]
    parts += _headers(made)
    return Report(_title(made), facts, list(_summary(made)), parts)


def _title(made: Diff) -> str:
    short = [PurePath(name.partition("@")[0]).name or name for name in (made.a, made.b)]
    return f"{short[1]} against {short[0]}"


def _counted(made: Diff) -> str:
    read = f", {len(made.lines):,} compared" if made.stats else ""
    elements = sum(line.totals.numel for line in made.lines)
    return f"{made.tensors[0]:,} in A, {made.tensors[1]:,} in B{read}" + (
        f" ({elements:,} elements)" if made.stats else ""
    )


def _summary(made: Diff) -> Iterator[str]:
    said = verdict(made)
    yield f"{said[0].upper()}{said[1:]}."
    moved = {k: t for k, t in made.families().items() if t.relative_norm}
    if moved:
        stack, name, _ = max(moved, key=lambda key: moved[key].relative_norm or 0.0)
        most = figure(moved[stack, name, None].relative_norm, "%")
        yield f"Most moved, for its size, is {label(made, stack, name)}: by {most} of its norm."


def heat_maps(made: Diff) -> Iterator[HeatMap]:
    """Yield a map for each stack of layers, families by layers; with the first, what is outside."""
    groups, families = made.groups(), made.families()
    stacks = list(dict.fromkeys(stack for stack, _, layer in groups if layer is not None))
    loose = [key for key in families if (*key[:2], None) in groups]
    for number, stack in enumerate(stacks or [""]):
        inside = [key for key in families if key[0] == stack and key not in loose]
        several = f" of {stack}" if len(stacks) > 1 else ""
        yield _heat_map(
            f"Change by layer and module{several}", groups, families, inside, loose * (not number)
        )


Groups = Mapping[tuple[str, str, int | None], Totals]


def _heat_map(
    title: str,
    groups: Groups,
    families: Groups,
    inside: Sequence[tuple[str, str, int | None]],
    loose: Sequence[tuple[str, str, int | None]],
) -> HeatMap:
    layers = sorted({k[2] for k in groups if k[2] is not None and (*k[:2], None) in inside})
    rows: list[tuple[str, list[Totals | None]]] = []
    for stack, name, _ in inside:
        held = [groups.get((stack, name, layer)) for layer in layers]
        rows.append((name, [families[stack, name, None], *held]))
    if len(inside) > 1:
        sums = [
            added_up(t for k, t in groups.items() if k[2] == i and (*k[:2], None) in inside)
            for i in layers
        ]
        rows.insert(0, ("all of these", [added_up(families[key] for key in inside), *sums]))
    for key in loose:
        rows.append((key[1], [families[key], *[None] * len(layers)]))
    measures = [_measure(rows, *words) for words in MEANINGS]
    columns = [ALL, *map(str, layers)]
    return HeatMap(title, [name for name, _ in rows], columns, measures, margin=True)


def _measure(
    rows: Sequence[tuple[str, Sequence[Totals | None]]],
    name: str,
    meaning: str,
    unit: str,
    scale: Scale,
    of: Of,
) -> Measure:
    values = [[None if t is None or not _moves(t) else of(t) for t in held] for _, held in rows]
    return Measure(name, values, meaning, unit, scale)


def _moves(totals: Totals) -> bool:
    """Say whether distances mean anything: not for numbers that are no floats."""
    return totals.floats > 0 or totals.numel == 0


def _steps(made: Diff) -> Histograms:
    """Return how far elements moved in steps of their dtype: all, then family by family."""
    named = [("all tensors", made.total())]
    named += [(label(made, stack, name), t) for (stack, name, _), t in made.families().items()]
    last = max((place for _, t in named for place in range(1, BINS) if t.bins[place]), default=1)
    panels = [
        Panel(name, [int(count) for count in totals.bins[1 : last + 1]], _unmoved(totals))
        for name, totals in named
        if totals.floats
    ]
    return Histograms(
        "How far elements moved, in steps of their dtype",
        [_bin(place) for place in range(1, last + 1)],
        panels,
        axis="distance in units in the last place (ULP)",
        of="share of the elements that moved",
        meaning="A step is the gap to the next number that the dtype can hold. Of the elements "
        "that moved, each bar is the share that moved so far; each panel has a scale of its own.",
    )


def _unmoved(totals: Totals) -> str:
    share = 1 - totals.bins[0] / totals.finite if totals.finite else 0.0
    return (
        "nothing moved"
        if not share
        else f"{figure(share, '%')} moved"
        if share < 1
        else "all moved"
    )


def _bin(place: int) -> str:
    """Return a bin's name, short: 1, 2, 3-4, then what it reaches."""
    least, most = edges(place)
    if most < 2**10:
        return f"{least}\u2013{most}" if most > least else str(most)
    unit = max((name for name in UNITS if UNITS[name] <= most), key=UNITS.__getitem__)
    return f"\u2264 {most // UNITS[unit]}{unit}"


NUMBERS = (
    Column("elements", number=True),
    Column("relative norm", number=True, unit="%", meaning=MEANINGS[0][1]),
    Column("1 \u2212 cosine", number=True, meaning=MEANINGS[1][1]),
    Column("changed", number=True, unit="%", meaning=MEANINGS[2][1]),
    Column("sign changed", number=True, unit="%", meaning=MEANINGS[3][1]),
    Column("largest change", number=True, meaning=MEANINGS[4][1]),
)


def _numbers(totals: Totals) -> list[Cell]:
    if not _moves(totals):
        return [totals.numel, None, None, totals.changed_share, None, None]
    return [totals.numel, *(of(totals) for *_, of in MEANINGS)]


def _families(made: Diff) -> Table:
    rows = [
        (label(made, stack, name), *_numbers(totals))
        for (stack, name, _), totals in made.families().items()
    ]
    return Table("Module families, all layers together", (Column("module"), *NUMBERS), rows)


def _tensors(lines: Sequence[Line]) -> Table:
    columns = [Column("tensor"), Column("dtype"), Column("shape"), *NUMBERS]
    odd = ("NaN in A", "Inf in A", "NaN in B", "Inf in B")
    kept = [i for i in range(4) if any(line.totals.odd[i] for line in lines)]
    columns += [Column(odd[i], number=True) for i in kept]
    rows = [
        (
            line.name,
            line.dtype,
            "\u00d7".join(map(str, line.shape)) or "scalar",
            *_numbers(line.totals),
            *(line.totals.odd[i] for i in kept),
        )
        for line in lines
    ]
    return Table("Tensors", columns, rows)


def _headers(made: Diff) -> Iterator[Part]:
    """Yield the differences that headers and side files tell, and what else is to be known."""
    for part, rows in made.headers.items():
        if rows:
            yield Notes(f"Differences in {part}", [row_text(row) for row in rows])
    agree = [part for part, rows in made.headers.items() if not rows]
    if agree:
        yield Notes("What agrees", [", ".join(agree)])
    if made.unread:
        yield Notes("Tensors that could not be compared", made.unread)
    if made.notes:
        yield Notes("Notes", made.notes)


def drawn(made: Diff, measure: str) -> tuple[HeatMap | None, str]:
    """Return the heat map to draw, and the measure that it has by this name of the command's."""
    number = MEASURES.index(measure)
    return next(heat_maps(made), None) if made.lines else None, MEANINGS[number][0]
