"""Words and columns for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

SHOWN = 8  # values of one cell before "..."


def size(nbytes: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def count(number: int, noun: str) -> str:
    """Return "1 tensor" or "2 tensors"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def value(raw: Any) -> str:
    """Return a parameter's value, short."""
    if isinstance(raw, bool) or raw is None:
        return {True: "true", False: "false", None: "-"}[raw]
    if isinstance(raw, float):
        return f"{raw:.6g}"
    if isinstance(raw, list | tuple):
        more = " ..." if len(raw) > SHOWN else ""
        return " ".join(map(value, raw[:SHOWN])) + more
    return str(raw)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """Return lines whose columns are aligned, the first to the left."""
    everything = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    return [
        (indent + "  ".join(_padded(i, cell, widths[i]) for i, cell in enumerate(row))).rstrip()
        for row in everything
    ]


def _padded(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
