"""Sums of sparse changes, a window of places at a time, and how their supports meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from mergekit_ft.contract import CELL
from mergekit_ft.deltas.candidates import true_places
from mergekit_ft.deltas.members import Member
from mergekit_ft.deltas.reach import Row
from mergekit_ft.errors import OperatorError
from mergekit_ft.sources.delta_entries import Entries

LEAST, MOST = CELL, 16 * CELL  # places in a window
EACH = 96  # bytes that a place takes; and two more for each member
NEGATIVE, POSITIVE, ZERO = 1, 2, 4  # what a member does at a place; 0: nothing


class Sum(NamedTuple):
    """What all members together add to one window of a tensor."""

    places: Row  # (m,) int64 in the tensor, increasing
    values: Row  # (m,) float64


@dataclass
class Meeting:
    """Where two members change the same entries."""

    shared: int = 0
    conflicts: int = 0  # of these, changed in opposite directions


@dataclass
class Tally:
    """What was seen of the members while they were added up."""

    energies: dict[str, list[float]] = field(default_factory=dict)  # squares by cell, by digest
    total: list[float] = field(default_factory=list)  # squares of the sum, by cell
    entries: dict[str, int] = field(default_factory=dict)  # by digest
    meetings: dict[tuple[str, str], Meeting] = field(default_factory=dict)  # by digests

    def energy(self, digest: str) -> float:
        """Return the squared norm of what one member adds."""
        return math.fsum(self.energies.get(digest, ()))


def window_size(memory: int, members: int) -> int:
    """Return the places in a window: whole cells, within the budget."""
    each = EACH + 2 * members
    if memory < each * LEAST:
        raise OperatorError(
            f"{members} members need at least {each * LEAST:,} bytes of memory, more than the "
            f"{memory:,} given; raise --memory"
        )
    return min(MOST, memory // (each * CELL) * CELL)


class Adding:
    """The sum of the members' changes of one tensor."""

    def __init__(self, name: str, members: Sequence[Member], size: int) -> None:
        self.name, self.members, self.size = name, members, size
        self._entries = [Entries(m.delta, m.delta.changes[name]) for m in members]
        self.numel = members[0].delta.changes[name].numel
        n = -(-min(size, self.numel) // 8) * 8
        self._total, self._touched = np.zeros(n), np.zeros(n, np.bool_)
        self._codes = np.zeros((len(members), n), np.int8)  # all are zero between windows

    def windows(self, tally: Tally | None) -> Iterator[Sum]:
        """Yield the sum window by window; what is seen is added to the tally, if there is one."""
        for start in range(0, self.numel, self.size):
            stop = min(start + self.size, self.numel)
            parts = [self._part(i, start, stop) for i in range(len(self.members))]
            if any(len(places) for places, _ in parts):
                yield self._added(start, parts, tally)

    def alone(self, found: Sum) -> torch.Tensor | None:
        """Return the values that a sole member puts there, where they are meant to the bit."""
        member, change = self.members[0], self._entries[0].change
        if len(self.members) > 1 or member.weight != 1.0 or change.kind != "replace":
            return None
        last = int(found.places[-1]) + 1
        indices, first = self._entries[0].within(int(found.places[0]), last)
        return self._entries[0].values("values", first, len(indices))

    def _part(self, i: int, start: int, stop: int) -> tuple[Row, Row]:
        """Return what one member adds in a window: places from its start, and float64 values."""
        entries, change = self._entries[i], self._entries[i].change
        indices, first = entries.within(start, stop)
        values = entries.values("values", first, len(indices)).double()
        if change.kind == "replace":
            values -= entries.values("originals", first, len(indices)).double()
        return (indices - start).numpy(), (values * self.members[i].weight).numpy()

    def _added(self, start: int, parts: Sequence[tuple[Row, Row]], tally: Tally | None) -> Sum:
        total, touched = self._total, self._touched
        for places, values in parts:  # in the order of the members' digests
            total[places] += values
            touched[places] = True
        places = true_places(touched)
        found = total[places]
        total[places], touched[places] = 0.0, False
        if tally is not None:
            tally.total += _squares(places, found)
            self._count(parts, tally)
        return Sum(places + start, found)

    def _count(self, parts: Sequence[tuple[Row, Row]], tally: Tally) -> None:
        for member, code, (places, values) in zip(self.members, self._codes, parts, strict=True):
            digest = member.digest
            tally.energies.setdefault(digest, []).extend(_squares(places, values))
            tally.entries[digest] = tally.entries.get(digest, 0) + len(places)
            code[places] = np.where(values < 0, NEGATIVE, np.where(values > 0, POSITIVE, ZERO))
        for i, j in combinations(range(len(parts)), 2):
            places = parts[i][0]
            mine, theirs = self._codes[i][places], self._codes[j][places]
            met = tally.meetings.setdefault(_both(self.members[i], self.members[j]), Meeting())
            met.shared += int(np.count_nonzero(theirs))
            met.conflicts += int(np.count_nonzero(mine + theirs == NEGATIVE + POSITIVE))
        for code, (places, _) in zip(self._codes, parts, strict=True):
            code[places] = 0


def _both(one: Member, other: Member) -> tuple[str, str]:
    return one.digest, other.digest


def _squares(places: Row, values: Row) -> list[float]:
    """Return the sums of squares by cell; a window is whole cells, from the start of one."""
    return [float(s) for s in np.bincount(places // CELL, weights=values**2) if s]


def as_floats(values: Row, wide: bool) -> torch.Tensor:
    """Return float64 sums rounded to what a delta holds: float32, float64 where the tensor is."""
    found = torch.from_numpy(values)
    return found if wide else found.float()
