"""How much of a merge's change is left when it is rounded to the dtype that it is stored in.

With d the change that a plan asks of the base and r the one that is stored, r = round(theta_0 + d)
- round(theta_0): along <r, d> / <d, d>, and the cosine <r, d> / (|r| |d|). Where tuning moved a
weight by one step of its dtype, half of the step is rounded to all of it or to nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.contract import Block
from mergekit_ft.resolution import Task
from mergekit_ft.sources.dtypes import NAME, TORCH

WINDOW, STRIDE = 2**12, 2**22  # elements that are looked at, of so many
FAR = 0.1  # from the whole change, or from its direction, that is told

Sums = list[float]  # <d, d>, <r, d>, <r, r>


class Rounding:
    """The sums over a sample of each tensor, added up as its blocks come."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Sums]] = {}
        self._lock = threading.Lock()

    def see(self, task: Task, block: Block, values: Tensor) -> None:
        """Look at (n,) merged values that are still to be rounded; without a base at none."""
        dtype = TORCH[task.dtype]
        if dtype.itemsize > 2 or not block.base.numel():
            return
        for part in windows(block.start, block.n):
            ends = torch.stack([values.flatten()[part], block.base[part]]).cpu()  # (2, window)
            merged, base = torch.stack([ends, ends.to(dtype).to(ends.dtype)], dim=1).double()
            moved = merged - base  # (2, window) as asked, as stored
            (asked, along), (_, stored) = (moved @ moved.T).tolist()
            with self._lock:
                self._parts.setdefault(task.name, []).append([asked, along, stored])

    def of(self, name: str) -> Sums | None:
        """Return the sums of a tensor, whatever the order of its blocks; None if none was seen."""
        parts = self._parts.pop(name, None)
        return None if parts is None else [math.fsum(column) for column in zip(*parts, strict=True)]


def windows(start: int, n: int) -> Iterator[slice]:
    """Yield what is looked at of `n` elements from `start` on, counted from there."""
    for first in range(start - start % STRIDE, start + n, STRIDE):
        begin, end = max(first, start), min(first + WINDOW, start + n)
        if begin < end:
            yield slice(begin - start, end - start)


@dataclass(frozen=True)
class Kept:
    """What is left of the change of all tensors."""

    along: float  # of the change that was asked
    cosine: float

    @property
    def near(self) -> bool:
        """Say whether it is the change that was asked."""
        return abs(self.along - 1) <= FAR and self.cosine >= 1 - FAR


def kept(tasks: Sequence[Task], sums: Mapping[str, Sums]) -> Kept | None:
    """Return what is left, each tensor standing for all its elements; None where none changed."""
    parts = [(0.0, 0.0, 0.0)]
    for task in (task for task in tasks if task.name in sums):
        seen = sum(part.stop - part.start for part in windows(0, task.numel))
        asked, along, stored = sums[task.name]
        share = task.numel / seen
        parts.append((share * asked, share * along, share * stored))
    asked, along, stored = (math.fsum(column) for column in zip(*parts, strict=True))
    if not asked > 0 or not math.isfinite(asked + stored):
        return None
    return Kept(along / asked, along / math.sqrt(asked * stored) if stored else 0.0)


def rounding_notes(tasks: Sequence[Task], sums: Mapping[str, Sums]) -> Iterator[str]:
    """Yield what a user should know of it."""
    found = kept(tasks, sums)
    if found is None or found.near:
        return
    dtypes = ", ".join(sorted({NAME[task.dtype] for task in tasks if task.name in sums}))
    yield (
        f"stored in {dtypes}, the change is {found.along:.2f} times what the plan asks for, at a "
        f"cosine of {found.cosine:.2f} (a sample of each tensor): many weights are to move by less "
        "than a step of that dtype; `out_dtype: float32` stores all of it"
    )
