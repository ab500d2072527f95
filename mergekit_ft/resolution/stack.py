"""The stack of an output as reports show it, and what of its models is in no slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.resolution.columns import Column, Slice, Taken
from mergekit_ft.resolution.depths import Depths


@dataclass(frozen=True)
class Stack:
    """Which layers the output's layers are made of, and what its config says of them."""

    columns: Sequence[Column]
    depths: Depths

    @property
    def edits(self) -> Mapping[str, Any]:
        """Return the edits of the donor's config.json."""
        return self.depths.edits

    @property
    def moves(self) -> bool:
        """Say whether any layer comes from another place than its own."""
        taken = [(t.first, s.first) for c in self.columns for s in c.slices for t in s.taken]
        return any(one != other for one, other in taken)


def drawn(stack: Stack) -> Iterator[dict[str, Any]]:
    """Yield each output slice: its layers, its sources, and the layers that were taken before."""
    for column in stack.columns:
        seen: dict[tuple[str, int], int] = {}
        for one in column.slices if column.stack is not None else ():
            yield {
                "stack": column.stack,
                "layers": [one.first, one.first + one.layers],
                "sources": [_source(taken, one, seen) for taken in one.taken],
            }


def _source(taken: Taken, one: Slice, seen: dict[tuple[str, int], int]) -> dict[str, Any]:
    """Return what is taken, and which of its layers an earlier output layer is made of too."""
    again = []
    for number in taken.span:
        at = one.first + number - taken.first
        if (str(taken.model), number) in seen:
            again.append({"layer": number, "first": seen[str(taken.model), number]})
        seen.setdefault((str(taken.model), number), at)
    span = [taken.first, taken.end]
    return {"model": str(taken.model), "layers": span, "base": taken.base, "again": again}


def lines(slices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the drawing as text."""
    several = len({part["stack"] for part in slices}) > 1
    for part in slices:
        where = f"{part['stack']} " if several else ""
        sources = " + ".join(_said(source) for source in part["sources"])
        yield f"  {where}out {span(part['layers'])} <- {sources}"


def _said(source: Mapping[str, Any]) -> str:
    base = " (base)" if source["base"] else ""
    again = [item["layer"] for item in source["again"]]
    said = f" ({', '.join(map(span, runs(again)))} again)" if again else ""
    return f"{source['model']} {span(source['layers'])}{base}{said}"


def span(layers: Sequence[int]) -> str:
    """Return [0, 15] as "0-14"."""
    first, end = layers
    return str(first) if end - first == 1 else f"{first}-{end - 1}"


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as ranges, the ends not included."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found
