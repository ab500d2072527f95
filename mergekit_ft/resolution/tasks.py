"""One output tensor: where it comes from and what happens to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mergekit_ft.contract import CELL, About, Adjustment, Operator
from mergekit_ft.layers import Place
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import SIZE

Then = tuple[Adjustment, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of a source."""

    source: Source
    name: str
    info: TensorInfo


@dataclass(frozen=True)
class Task:
    """One output tensor: where it comes from and what happens to it."""

    name: str
    known: str  # the name that answers for it: the one it is tied to, else its own
    shape: tuple[int, ...]
    dtype: str  # stored, as a safetensors code
    place: Place
    base: Ref | None  # None where the method ignores the base and nothing follows the merge
    tuned: tuple[Ref, ...]  # (k,)
    ids: tuple[str, ...]  # (k,)
    operator: Operator | None = None  # None: not a tensor that merges
    then: Then = ()
    copy: Ref | None = None  # the tensor that comes out as it is
    bits: int = 32  # of the floats that the arithmetic is done in
    first_cell: int = 0  # in the stream of a survey over the whole model

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @cached_property
    def cell(self) -> int:
        """Return the elements of a cell."""
        return self.operator.grain.cell(self.shape) if self.operator is not None else CELL

    @cached_property
    def scratch(self) -> int:
        """Return the rows of scratch that its operators need."""
        operators = [op for op in (self.operator, *self.then) if op is not None]
        return max((op.scratch(len(self.tuned)) for op in operators), default=0)

    @property
    def surveyed(self) -> bool:
        """Say whether a survey over the whole model sees it: tied tensors count once."""
        return self.operator is not None and self.name == self.known

    @property
    def nbytes(self) -> int:
        """Return the bytes written."""
        return self.numel * SIZE[self.dtype]

    @property
    def bytes_read(self) -> int:
        """Return the bytes that one pass over the sources reads."""
        refs = [self.copy] if self.copy is not None else [self.base, *self.tuned]
        return sum(ref.info.nbytes for ref in refs if ref is not None)

    def about(self, spare: int = 2**62) -> About:
        """Return what is known of the tensor unread, for a survey that may keep `spare` bytes."""
        known = (self.ids, self.numel, self.known, self.place, self.bits)
        based = self.base is not None
        return About(*known, spare=spare, shape=self.shape, cell=self.cell, based=based)
