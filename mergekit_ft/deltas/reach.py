"""What a change must reach to be among the k largest: guessed from a sample, then raised.

Sixteen-bit models change by few different amounts, so that a tenth of all entries may equal the
k-th largest. Of equal ones the first are kept: once k entries of at least a level came before, no
later one of that level has a chance, and none of them need be looked at.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = np.ndarray[Any, np.dtype[Any]]

SAFETY, SIGMAS = 1.3, 4.0  # of the rank in the sample: how much lower the lowest level is
LEVELS = 8  # between there and what less than half of that reach


class Reach:
    """The least magnitude that still has a chance; any thread may ask and tell."""

    def __init__(self, rank: int, levels: Sequence[float] = (0.0,)) -> None:
        self.rank, self.lowest = rank, float(levels[0])
        self._levels = np.array(levels)
        self._counts = np.zeros(len(levels), np.int64)  # of what came first without a gap
        self._told: dict[int, Row] = {}  # by the block's number, of what came after a gap
        self._next = 0
        self._lock = threading.Lock()

    def floor(self, kind: type[np.floating[Any]]) -> float:
        """Return the least magnitude that has a chance, in this kind of float."""
        won = int(np.count_nonzero(self._counts >= self.rank))  # counts fall from level to level
        if not won:
            return self.lowest
        return float(np.nextafter(kind(self._levels[won - 1]), kind(math.inf)))

    def tell(self, number: int, sizes: Row) -> None:
        """Hear the magnitudes of a block that may be kept; blocks are numbered from 0, in order."""
        reached = np.count_nonzero(~(sizes < self._levels[:, None].astype(sizes.dtype)), axis=1)
        with self._lock:
            self._told[number] = reached
            while self._next in self._told:
                self._counts = self._counts + self._told.pop(self._next)
                self._next += 1

    def lowered(self) -> Reach:
        """Return one that leaves out nothing that differs, for a guess that was too high."""
        return Reach(self.rank, [0.0, *self._levels.tolist()])


def guessed(sample: Row, total: int, rank: int) -> Reach:
    """Return what the rank-th largest of `total` magnitudes almost surely reaches."""
    expected = len(sample) * rank / total
    place = math.ceil(SAFETY * expected + SIGMAS * math.sqrt(expected)) + 2
    if place >= len(sample):
        return Reach(rank)
    places = np.unique(np.linspace(0.45 * place, place, LEVELS).astype(np.int64))
    levels = np.partition(sample, len(sample) - places)[len(sample) - places]
    return Reach(rank, np.unique(levels[np.isfinite(levels)]).tolist() or (0.0,))
