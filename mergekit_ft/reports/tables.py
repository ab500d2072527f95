"""Tables that the reader sorts by a click and narrows by a word."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_ft.reports.figures import cell, escaped
from mergekit_ft.reports.report import Cell, Column, Table

MANY = 12  # rows from which on a search is offered


def table(part: Table, key: str) -> Iterator[str]:
    """Yield a table; without a script it stands as it was given."""
    yield f'<section class="rows" aria-labelledby="{key}">'
    yield f'<h2 id="{key}">{escaped(part.title)}</h2>'
    if part.note:
        yield f"<p>{escaped(part.note)}</p>"
    if len(part.rows) >= MANY:
        yield (
            '<label class="search scripted" hidden>only rows with '
            f'<input type="search" data-of="{key}-t"></label>'
        )
    yield (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(part.title)}">'
        f'<table class="sortable" id="{key}-t"><thead><tr>'
    )
    yield from map(_head, part.columns)
    yield "</tr></thead><tbody>"
    for row in part.rows:
        cells = zip(part.columns, row, strict=True)
        yield f"<tr>{''.join(_cell(column, value) for column, value in cells)}</tr>"
    yield "</tbody></table></div></section>"


def _head(column: Column) -> str:
    kind = ' class="number"' if column.number else ""
    told = f' title="{escaped(column.meaning)}"' if column.meaning else ""
    return f'<th scope="col"{kind}{told}>{escaped(column.name)}</th>'


def _cell(column: Column, value: Cell) -> str:
    said = escaped(cell(value, column.unit))
    if not column.number:
        return f"<td><bdi>{said}</bdi></td>"
    sorted_by = "" if value is None else escaped(str(value))
    return f'<td class="number" data-v="{sorted_by}">{said}</td>'
