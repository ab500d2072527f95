"""The exact k-th largest among spooled magnitudes, by counting their bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_ft.deltas.candidates import Entries, Found, Spool
from mergekit_ft.deltas.reach import Row

BATCH = 4  # part of a block's elements that are counted at a time
DIGIT = 16  # bits that one look at the spool settles


@dataclass(frozen=True)
class Cut:
    """Which entries are kept: all above the threshold, and the first of those equal to it."""

    threshold: int  # bits of the k-th largest magnitude
    quota: int  # how many that are equal to it are kept, in the order of the tensors

    def kept(self, entries: Entries) -> tuple[Row, Cut]:
        """Say which of a run's entries are kept, and what is left for the runs that follow."""
        kept = entries.magnitudes > self.threshold
        equal = np.flatnonzero(entries.magnitudes == self.threshold)[: self.quota]
        kept[equal] = True
        return kept, Cut(self.threshold, self.quota - len(equal))

    def as_float(self, bits: int) -> float:
        """Return the k-th largest magnitude."""
        kinds = (np.uint32, np.float32) if bits == 32 else (np.uint64, np.float64)
        return float(np.array(self.threshold, kinds[0]).view(kinds[1]))


def cut_of(spool: Spool, founds: Sequence[Found], rank: int, size: int) -> Cut | None:
    """Return the cut that keeps the `rank` largest; None where no more than those were found."""
    if sum(found.count for found in founds) <= rank:
        return None
    bits = founds[0].bits
    prefix, left = 0, rank
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counted = np.zeros(2**DIGIT, np.int64)
        for row in _magnitudes(spool, founds, size):
            digits = row >> row.dtype.type(shift)  # the last one, below those that are settled
            if shift < bits - DIGIT:
                digits = digits[digits >> row.dtype.type(DIGIT) == prefix]
            counted += np.bincount(digits & row.dtype.type(2**DIGIT - 1), minlength=2**DIGIT)
        digit, left = _digit_of_rank(counted, left)
        prefix = prefix << DIGIT | digit
    return Cut(prefix, left)


def _digit_of_rank(counted: Row, rank: int) -> tuple[int, int]:
    """Return the bin that holds the rank-th largest, and its rank (from 1) within that bin."""
    at_least = counted[::-1].cumsum()[::-1]  # in this bin and above
    digit = int(np.count_nonzero(at_least >= rank)) - 1
    return digit, rank - int(at_least[digit] - counted[digit])


def _magnitudes(spool: Spool, founds: Sequence[Found], size: int) -> Iterator[Row]:
    """Yield all magnitudes, in no order, some runs at a time."""
    held: list[Row] = []
    for found in founds:
        for run in found.runs:
            held.append(spool.magnitudes(run, found.bits))
            if sum(map(len, held)) >= size // BATCH:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)
