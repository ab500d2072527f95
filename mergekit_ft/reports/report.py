"""What a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Value = float | int | None  # None: there is nothing here
Cell = str | float | int | None
Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class Measure:
    """One number for each cell of a heat map."""

    name: str  # "relative norm"
    values: Sequence[Sequence[Value]]  # (rows, columns)
    meaning: str = ""  # one sentence for who never heard of it
    unit: str = ""  # "%" takes shares: 0.05 is written 5%
    scale: Scale = "linear"  # of the colours

    def __post_init__(self) -> None:
        if len({len(row) for row in self.values}) > 1:
            raise ValueError(f"{self.name}: its rows differ in length")


@dataclass(frozen=True)
class HeatMap:
    """A grid of coloured cells; where it has several measures, the reader chooses."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    measures: Sequence[Measure]
    row_axis: str = "module"
    column_axis: str = "layer"
    margin: bool = False  # the first column sums up the others, and is written out
    note: str = ""
    written: bool = False  # every cell is written out: of few ones
    missing: str = "no such tensor"  # what a cell without a value means

    def __post_init__(self) -> None:
        for measure in self.measures:
            if (len(measure.values), *map(len, measure.values[:1])) != (
                len(self.rows),
                *([len(self.columns)] if self.rows else []),
            ):
                raise ValueError(f"{self.title}: {measure.name} has not a value for each cell")

    def measure(self, name: str) -> Measure:
        """Return a measure by its name."""
        return next(measure for measure in self.measures if measure.name == name)


@dataclass(frozen=True)
class Panel:
    """One histogram."""

    name: str
    counts: Sequence[float]
    note: str = ""  # "86% unchanged"


@dataclass(frozen=True)
class Histograms:
    """Histograms over the same bins, side by side; the first may be larger: it sums up."""

    title: str
    bins: Sequence[str]
    panels: Sequence[Panel]
    axis: str = ""  # what the bins are
    of: str = ""  # what is counted: "share of the changed elements"
    meaning: str = ""
    first_large: bool = True

    def __post_init__(self) -> None:
        if any(len(panel.counts) != len(self.bins) for panel in self.panels):
            raise ValueError(f"{self.title}: a panel has not a count for each bin")


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    number: bool = False
    unit: str = ""  # "%" takes shares
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that the reader can sort and search."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row has not a cell for each column")


@dataclass(frozen=True)
class Notes:
    """Sentences, one a line."""

    title: str
    lines: Sequence[str]


Part = HeatMap | Histograms | Table | Notes


@dataclass(frozen=True)
class Report:
    """A page: what was looked at, what came out, and the parts in the order of reading."""

    title: str
    facts: Sequence[tuple[str, str]] = ()  # name and value: what was compared, and how
    summary: Sequence[str] = ()  # sentences
    parts: Sequence[Part] = ()
