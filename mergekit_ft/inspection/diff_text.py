"""A comparison of two checkpoints as lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_ft.inspection.tables import count, table
from mergekit_ft.reports.figures import cosine, figure, visible

if TYPE_CHECKING:
    from mergekit_ft.inspection.comparison import Totals
    from mergekit_ft.inspection.diff import Diff, Line

SHOWN = 8  # differences of one part
WORDS = {"names": "names of tensors", "files": "side files", "layout": "layout of files"}
WIDE = 60  # characters of a value
HEAD = ("relative norm", "cosine", "changed", "same sign", "largest change")


def lines(made: Diff, shown: Sequence[Line]) -> Iterator[str]:
    """Yield a comparison as text, with these of the tensors."""
    yield f"A  {visible(made.a)}: {count(made.tensors[0], 'tensor')}"
    yield f"B  {visible(made.b)}: {count(made.tensors[1], 'tensor')}"
    yield from (f"{glob}: {count(hits, 'tensor')}" for glob, hits in made.matches.items())
    for part, rows in made.headers.items():
        yield from _part(part, rows)
    yield from (f"note: {visible(note)}" for note in made.notes)
    if made.stats and made.lines:
        yield from _tables(made, shown)
    yield verdict(made)


def verdict(made: Diff) -> str:
    """Return what all of it comes to, in one sentence."""
    differ = [part for part, rows in made.headers.items() if any("unread" not in r for r in rows)]
    headers = (
        f"differ in {', '.join(WORDS.get(part, part) for part in differ)}"
        if differ
        else "headers and side files agree"
    )
    if made.weights == "unknown":
        return f"{headers}; weights not compared (--stats reads them)"
    if made.stats:
        return f"{headers}; {_weights(made)}"
    return f"{headers}; weights not read, {made.weights}: {made.how}"


def _weights(made: Diff) -> str:
    """Say of the weights that were read whether they are equal."""
    moved = [line for line in made.lines if line.totals.changed]
    without = f", {count(len(made.unread), 'tensor')} not comparable" if made.unread else ""
    if not moved:
        return f"all {count(len(made.lines), 'tensor')} that both have are equal{without}"
    total = made.total()
    return (
        f"{len(moved):,} of {count(len(made.lines), 'tensor')} differ, in "
        f"{total.changed:,} of {count(total.numel, 'element')} "
        f"({figure(total.changed_share, '%')}){without}"
    )


def _part(part: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if rows:
        yield f"{part}: {count(len(rows), 'difference')}"
        yield from (f"  {visible(row_text(row))}" for row in rows[:SHOWN])
    if len(rows) > SHOWN:
        yield f"  ... and {len(rows) - SHOWN:,} more (--json has them all)"


def row_text(row: dict[str, Any]) -> str:
    """Return one difference as a line."""
    name = str(row.get("name") or row.get("what"))
    if "only_in" in row:
        return f"{name}: only in {row['only_in']}{_more(row)}"
    if row.get("unread"):
        return f"{name}: not fetched, not compared"
    if row.get("differs"):
        return f"{name}: differs"
    if row.get("what") == "unreadable":
        return f"the tokenizer of {row['in']} cannot be read: {row['why']}"
    if "count" in row:
        first = row["first"] if isinstance(row["first"], list) else [row["first"]]
        more = ", ..." if row["count"] > len(first) else ""
        return f"{name}: {row['count']:,} ({', '.join(map(str, first))}{more})"
    where = f" of {row['file']}" if "file" in row else ""
    if "a" not in row and "b" not in row:
        return f"{name}{where}: differs"
    return f"{name}{where}: {_value(row, 'a')} in A, {_value(row, 'b')} in B"


def _more(row: dict[str, Any]) -> str:
    """Return what else is known of a tensor that one of the two lacks."""
    if "dtype" not in row:
        return ""
    shape = "x".join(map(str, row["shape"])) or "scalar"
    tied = f"; the other ties it to {row['tied_to']}" if "tied_to" in row else ""
    renamed = f"; renamed? {row['renamed']}" if "renamed" in row else ""
    return f" ({row['dtype']} {shape}){tied}{renamed}"


def _value(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "absent"
    value = row[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDE else f"{text[: WIDE - 4]} ..."


def _tables(made: Diff, shown: Sequence[Line]) -> Iterator[str]:
    yield ""
    families = [
        (visible(label(made, stack, name)), *cells(totals))
        for (stack, name, _), totals in made.families().items()
    ]
    yield from table(("module family", *HEAD), [*families, ("all", *cells(made.total()))])
    if shown:
        yield ""
        rows = [(visible(line.name), line.dtype, *cells(line.totals)) for line in shown]
        yield from table(("tensor", "dtype", *HEAD), rows)
        left = len(made.lines) - len(shown)
        if left:
            yield f"  ... and {left:,} more (--top {len(made.lines)}, --json)"
    yield ""


def label(made: Diff, stack: str, name: str) -> str:
    """Return a module family, with the stack that it is in where there are several."""
    several = len({line.place.stack for line in made.lines} - {""}) > 1
    return f"{stack}.*.{name}" if stack and several else name


def cells(totals: Totals) -> tuple[str, ...]:
    """Return the measures of a line of a table."""
    if totals.numel and not totals.floats:
        return ("-", "-", figure(totals.changed_share, "%"), "-", "-")
    return (
        figure(totals.relative_norm, "%"),
        cosine(totals.cosine),
        figure(totals.changed_share, "%"),
        figure(totals.sign_agreement, "%"),
        figure(totals.largest),
    )
