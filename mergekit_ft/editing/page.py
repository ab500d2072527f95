"""How edits fare, as lines of text, as a page and as a chart."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_ft.editing.judging import PROTOCOL
from mergekit_ft.editing.scores import MEASURES, SHARES, Scores
from mergekit_ft.evaluation.measures import Figure
from mergekit_ft.inspection.tables import count, table
from mergekit_ft.reports import Column, HeatMap, Measure, Notes, Report, Table

CHART = "share"


def lines(found: Scores) -> Iterator[str]:
    """Yield a table of all measures, and how they were come by."""
    rows = [
        (_word(name), _told(name, found.before[name]), _told(name, now), MEASURES[name])
        for name, now in found.after.items()
    ]
    widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = [(a, b, c, d.ljust(widest[3])) for a, b, c, d in rows]
    yield from table(("measure", "before", "after", ""), shown)
    asked = ", ".join(f"{number} of {name}" for name, number in found.asked.items())
    yield f"{count(found.edits, 'edit')}, asked {asked} as {found.template} prompts"
    yield PROTOCOL


def heat_map(found: Scores) -> HeatMap:
    """Return the map of models and measures that are shares."""
    names = [name for name in SHARES if name in found.after]
    sides = (found.before, found.after)
    shares = [[side[name].value for name in names] for side in sides]
    return HeatMap(
        "Edits",
        ["before", "after"],
        [_word(name) for name in names],
        [Measure(CHART, shares, PROTOCOL, "%")],
        row_axis="model",
        column_axis="measure",
        written=True,
    )


def report(found: Scores) -> Report:
    """Return the page of what was found."""
    hits = sum(one["right"] for one in found.answers if one["measure"] == "reliability")
    facts = (("edits", str(found.edits)), ("prompts", found.template))
    summary = (f"{hits} of {found.edits} edits are answered by their target.",)
    parts = (heat_map(found), _figures(found), _answers(found), Notes("Protocol", [PROTOCOL]))
    return Report("Edits", facts, summary, parts)


def _figures(found: Scores) -> Table:
    columns = (
        Column("measure"),
        Column("before", number=True),
        Column("after", number=True),
        Column("standard error", number=True, meaning="of after, over questions"),
        Column("meaning"),
    )
    rows = [
        (_word(name), found.before[name].value, now.value, now.stderr, MEASURES[name])
        for name, now in found.after.items()
    ]
    return Table("Figures", columns, rows)


def _answers(found: Scores) -> Table:
    names = ("where", "measure", "prompt", "right answer", "before", "after", "verdict")
    rows = [
        (
            one["where"],
            one["measure"],
            one["prompt"],
            " / ".join(one["answers"]),
            one["before"],
            one["after"],
            "right" if one["right"] else "wrong",
        )
        for one in found.answers
    ]
    return Table("Answers", tuple(map(Column, names)), rows)


def _word(measure: str) -> str:
    return measure.replace("_", " ")


def _told(measure: str, figure: Figure) -> str:
    """Return a figure and its standard error, shares in percent."""
    scale, places, sign = (100.0, 1, "%") if measure in SHARES else (1.0, 4, "")
    error = "" if figure.stderr is None else f" \u00b1{scale * figure.stderr:.{places}f}"
    return f"{scale * figure.value:.{places}f}{sign}{error}"
