"""Operators on small vectors, without an engine: blocks are cut here and surveys driven by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.deltas import add_base
from mergekit_ft.contract import (
    NOWHERE,
    About,
    Block,
    Finding,
    Grain,
    Measure,
    Operator,
    Place,
    Survey,
)

torch.set_num_threads(1)  # as in the engine's workers; more only wait for each other here

Vector = Sequence[float] | Tensor
NAMES = ("maths", "chat", "code", "law")


class Case:
    """One tensor of a base (empty: none) and of k tuned models, for one operator."""

    def __init__(
        self,
        operator: Operator,
        base: Vector,
        *tuned: Vector,
        name: str = "w",
        ids: Sequence[str] = NAMES,
        place: Place = NOWHERE,
        dtype: torch.dtype = torch.float32,
        size: int | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.operator = operator
        self.base = torch.as_tensor(base, dtype=dtype).flatten()
        self.tuned = torch.stack([torch.as_tensor(row, dtype=dtype).flatten() for row in tuned])
        bits = 64 if dtype == torch.float64 else 32
        self.shape = shape or (self.tuned.shape[1],)
        cell = operator.grain.cell(self.shape)
        whole = operator.grain is Grain.TENSOR
        self.size = size or (self.tuned.shape[1] if whole else cell)
        known = (tuple(ids[: len(tuned)]), self.tuned.shape[1], name, place, bits)
        based = bool(self.base.numel())
        self.about = About(*known, shape=self.shape, cell=cell, based=based)

    def blocks(self) -> Iterator[Block]:
        """Yield fresh blocks; what lies in their scratch is never a number."""
        k, n = self.tuned.shape
        for start in range(0, n, self.size):
            stop = min(start + self.size, n)
            scratch = (self.operator.scratch(k), stop - start)
            yield Block(
                name=self.about.name,
                shape=self.shape,
                start=start,
                base=self.base[start:stop].clone(),
                tuned=self.tuned[:, start:stop].clone(),
                ids=self.about.ids,
                place=self.about.place,
                first_cell=start // self.about.cell,
                cell=self.about.cell,
                scratch=torch.full(scratch, torch.nan, dtype=self.base.dtype),
            )

    def finding(self) -> Finding:
        """Return what the operator's survey finds."""
        return found(self.operator.survey(self.about), self.blocks)

    def merged(self) -> Tensor:
        """Return (n,) what `merge` makes of the blocks: a delta, or values."""
        finding = self.finding()
        return torch.cat([self.operator.merge(block, finding).clone() for block in self.blocks()])

    def values(self) -> Tensor:
        """Return (n,) the merged values."""
        merged = self.merged()
        apart = self.operator.yields_delta and bool(self.base.numel())
        return add_base(self.base, merged) if apart else merged

    def reference(self) -> Tensor:
        """Return (n,) what the operator's plain float64 form makes of the same."""
        base = self.base.double().view(self.shape) if self.base.numel() else self.base.double()
        tuned = [row.view(self.shape) for row in self.tuned.double()]
        return self.operator.reference(base, tuned, self.about).flatten()


def found(survey: Survey, blocks: Callable[[], Iterable[Block]]) -> Finding:
    """Drive a survey over blocks, one pass for each thing that it yields."""
    try:
        measures = next(survey)
        while True:
            totals = []
            for measure in measures:
                parts = [part_of(measure, block) for block in blocks()]
                totals.append(torch.cat(parts) if measure.cells else torch.stack(parts).sum(0))
            measures = survey.send(tuple(totals))
    except StopIteration as stop:
        return stop.value


def part_of(measure: Measure, block: Block) -> Tensor:
    """Return what a block adds to a measure."""
    part = measure.of(block)
    return part if measure.host is None else measure.host(block, part)


def vectors(k: int, n: int, seed: int = 0, **like: Any) -> list[Tensor]:
    """Return 1 + k random vectors on a grid so coarse that float32 holds their differences."""
    rolls = torch.Generator().manual_seed(seed)
    steps = torch.randint(-2048, 2049, (1 + k, n), generator=rolls)
    return list((steps.double() / 1024).to(**like))
