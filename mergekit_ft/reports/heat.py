"""Heat maps as tables of coloured cells: read by eye, by screen reader and on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mergekit_ft.reports.colours import STEPS, Ramp, ramp_of
from mergekit_ft.reports.figures import escaped, figure
from mergekit_ft.reports.report import HeatMap, Measure, Value

TICKS = 5  # numbers along a legend
BLANK = '<td class="blank"><i>none</i></td>'


def heat_map(part: HeatMap, key: str) -> Iterator[str]:
    """Yield a heat map; `key` tells its controls from those of others on the page."""
    yield f'<section class="heat" aria-labelledby="{key}">'
    yield f'<h2 id="{key}">{escaped(part.title)}</h2>'
    if part.note:
        yield f"<p>{escaped(part.note)}</p>"
    yield from _choice(part, key)
    for number, measure in enumerate(part.measures):
        yield f'<div class="view" id="{key}-{number}">'
        yield from _view(part, measure)
        yield "</div>"
    yield "</section>"


def shown_when_chosen(part: HeatMap, key: str) -> Iterator[str]:
    """Yield the style that shows the view of the measure that is chosen."""
    if len(part.measures) > 1:
        for number in range(len(part.measures)):
            yield f"#{key}-c{number}:checked ~ #{key}-{number} {{ display: block; }}"
            yield f'#{key}-c{number}:checked ~ .choice label[for="{key}-c{number}"] {{'
            yield "  background: var(--chosen); color: var(--on-chosen); }"
            yield f'#{key}-c{number}:focus-visible ~ .choice label[for="{key}-c{number}"] {{'
            yield "  outline: 3px solid var(--focus); outline-offset: 2px; }"
        yield f"#{key} ~ .view {{ display: none; }}"


def _choice(part: HeatMap, key: str) -> Iterator[str]:
    """Yield what chooses the measure: it works without a script."""
    if len(part.measures) < 2:
        return
    for number in range(len(part.measures)):
        checked = " checked" if number == 0 else ""
        yield (
            f'<input type="radio" class="unseen" name="{key}-choice" id="{key}-c{number}"{checked}>'
        )
    labels = (
        f'<label for="{key}-c{number}">{escaped(measure.name)}</label>'
        for number, measure in enumerate(part.measures)
    )
    yield f'<div class="choice">{"".join(labels)}</div>'


def _view(part: HeatMap, measure: Measure) -> Iterator[str]:
    ramp = ramp_of(measure)
    if measure.meaning:
        yield f'<p class="meaning">{escaped(measure.meaning)}</p>'
    yield from _legend(part, measure, ramp)
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(measure.name)}">'
    marks = f"{' margin' if part.margin else ''}{' written' if part.written else ''}"
    yield f'<table class="grid{marks}">'
    yield f'<caption class="unseen">{escaped(f"{part.title}: {measure.name}")}</caption>'
    yield from _head(part)
    yield "<tbody>"
    for name, values in zip(part.rows, measure.values, strict=True):
        alone = outside(part, values)
        cells = (
            BLANK
            if alone and place
            else _cell(value, measure, ramp, written=part.written or (part.margin and place == 0))
            for place, value in enumerate(values)
        )
        yield f'<tr><th scope="row"><bdi>{escaped(name)}</bdi></th>{"".join(cells)}</tr>'
    yield "</tbody></table></div>"


def _head(part: HeatMap) -> Iterator[str]:
    corner = f"{escaped(part.row_axis)} \\ {escaped(part.column_axis)}"
    labels = "".join(f'<th scope="col">{escaped(name)}</th>' for name in part.columns)
    yield f"<thead><tr><td>{corner}</td>{labels}</tr></thead>"


def outside(part: HeatMap, values: Sequence[Value]) -> bool:
    """Say whether a row has a sum alone, for it stands outside all columns."""
    return part.margin and not any(value is not None for value in values[1:])


def _cell(value: Value, measure: Measure, ramp: Ramp | None, *, written: bool) -> str:
    """Return a cell: its number is there to be read, and seen where it is written out."""
    if value is None:
        return '<td class="none"><i>none</i></td>'
    if not math.isfinite(value):
        return f'<td class="odd">!<i>{figure(value)}</i></td>'
    kind = f"s{ramp.step(value)}" if ramp is not None and value else "zero"
    said = figure(value, measure.unit)
    return f'<td class="{kind}">{said if written else f"<i>{said}</i>"}</td>'


def _legend(part: HeatMap, measure: Measure, ramp: Ramp | None) -> Iterator[str]:
    """Yield which colour stands for which number."""
    yield '<div class="legend">'
    if ramp is not None:
        swatches = "".join(
            f'<rect class="s{step}" x="{step * 10}" y="0" width="10.5" height="12"/>'
            for step in range(STEPS)
        )
        box = 'viewBox="0 0 240 12" preserveAspectRatio="none"'
        yield f'<div class="scale"><svg class="ramp" {box} aria-hidden="true">'
        yield f"{swatches}</svg>"
        ticks = ticks_of(ramp, measure.unit)
        yield f'<div class="ticks">{"".join(f"<span>{tick}</span>" for tick in ticks)}</div></div>'
    yield "<ul>"
    yield from _marks(part, measure, ramp)
    yield "</ul></div>"


def ticks_of(ramp: Ramp, unit: str) -> list[str]:
    """Return the numbers along a legend; the first may stand for what is less, too."""
    said = [figure(ramp.at(i / (TICKS - 1)), unit) for i in range(TICKS)]
    return [f"\u2264 {said[0]}" if ramp.clipped else said[0], *said[1:]]


def _marks(part: HeatMap, measure: Measure, ramp: Ramp | None) -> Iterator[str]:
    """Yield what the marks stand for, those that occur."""
    held = [value for row in measure.values for value in row]
    missing = any(None in row and not outside(part, row) for row in measure.values)
    if ramp is not None and ramp.scale == "log":
        yield "<li>logarithmic colours</li>"
    if any(value == 0 for value in held):
        yield '<li><span class="key zero"></span>exactly zero</li>'
    if missing:
        yield f'<li><span class="key none"></span>{escaped(part.missing)}</li>'
    if any(value is not None and not math.isfinite(value) for value in held):
        yield '<li><span class="key odd">!</span>not a finite number</li>'
