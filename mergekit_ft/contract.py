"""What a method owes and is owed.

An operator is a pydantic model whose fields are the method's parameters, *resolved for one tensor*:
a shared parameter holds one value, a per-model parameter a tuple of k values, a setting one value
for the whole plan. The engine makes one instance per output tensor and hands it blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mergekit_ft.layers import Place as Place
from mergekit_ft.layers import Role as Role

NOWHERE = Place()
CELL = 65_536  # elements: reductions are float64 sums over cells, added in order
RUN = 16_384  # elements of a run that a sample takes


def row_of(shape: tuple[int, ...]) -> int:
    """Return the elements of a row: the last axis; a tensor of one axis is one row."""
    return max(1, shape[-1] if len(shape) > 1 else prod(shape))


class Grain(Enum):
    """How much of a tensor an operator must see at once."""

    ELEMENT = "element"  # any run of elements may come alone
    ROW = "row"  # whole rows, along the last axis; a tensor of one axis is one row
    TENSOR = "tensor"  # only the whole tensor, in its shape

    def cell(self, shape: tuple[int, ...]) -> int:
        """Return the elements of a cell: of whole rows where those are what must be seen."""
        if self is not Grain.ROW:
            return CELL
        return row_of(shape) * max(1, CELL // row_of(shape))


class Base(Enum):
    """What a method does with the plan's base model."""

    REQUIRED = "required"  # apart from the tuned models, as `Block.base`
    OPTIONAL = "optional"  # the same where the plan names one; else `Block.base` is empty
    IGNORED = "ignored"  # one of the models, as a row of `Block.tuned`


@dataclass(slots=True)
class Block:
    """One run of elements of one tensor from every source.

    The operator owns the buffers: they are refilled for the next block. `merge` may overwrite
    `tuned` and `delta`, never `base`; a measure overwrites nothing but scratch.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # flat row-major index of the first element
    base: Tensor  # (n,) float32, or float64 when a source is; (0,) when there is none
    tuned: Tensor  # (k, n)
    ids: Sequence[str]  # (k,) the models as the plan names them: keys of randomness
    place: Place
    first_cell: int  # ordinal of the block's first cell in the stream that a survey sees
    scratch: Tensor  # (s, n) as many rows as the operator asked for
    delta: Tensor | None = None  # (n,) the merged delta so far, for operators after `then:`;
    # it may lie in a row of scratch, so `adjust` takes none
    cell: int = CELL  # elements of a cell; a block is whole cells, but for the tensor's end
    made: Tensor | None = None  # what a measure made in scratch for others of the same block

    @property
    def n(self) -> int:
        """Return how many elements the block holds."""
        return self.tuned.shape[1]


class Measure(NamedTuple):
    """One reduction in a pass over blocks.

    `of` maps a block to a tensor. A tally (`cells` false) is added up over the blocks, so it holds
    integers; otherwise it has one float64 row per cell, (cells, s), and the rows are kept in order.
    `merged` asks for `Block.delta`, the delta that the operators before this one made. `host` turns
    a block's rows, moved to host memory, into those that are kept; their number may depend on the
    values. `every` n takes only each n-th run of RUN elements (or of whole cells, where an operator
    must see rows), for a sample.
    """

    of: Callable[[Block], Tensor]
    cells: bool = False
    merged: bool = False
    host: Callable[[Block, Tensor], Tensor] | None = None
    every: int = 1


Finding = Any  # what a survey found: numbers, tuples of numbers; JSON can hold it
# A survey yields the measures of one pass, is sent their totals, and returns its finding.
Survey = Generator[tuple[Measure, ...], tuple[Tensor, ...], Finding]


Share = Annotated[float, Field(ge=0, le=1)]  # of a tensor's entries


def per_model(default: Any = ..., **field: Any) -> Any:
    """Declare a parameter with a value for each tuned model; its annotation is a tuple."""
    return Field(default, json_schema_extra={"scope": "model"}, **field)


def shared(default: Any = ..., **field: Any) -> Any:
    """Declare a parameter with one value for each tensor."""
    return Field(default, json_schema_extra={"scope": "tensor"}, **field)


def setting(default: Any = ..., **field: Any) -> Any:
    """Declare a parameter with one value for the whole plan: no gradient, no filter."""
    return Field(default, json_schema_extra={"scope": "plan"}, **field)


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a tensor (for a survey over the whole model: of the model) unread."""

    ids: Sequence[str]  # (k,)
    numel: int
    name: str = ""
    place: Place = NOWHERE
    bits: int = 32  # of the floats that the arithmetic is done in
    finding: Finding = None  # for a reference: what the survey over the whole model found
    first_cell: int = 0  # for a reference: ordinal of the tensor's first cell in that survey
    spare: int = 2**62  # bytes that a survey may keep besides its blocks
    shape: tuple[int, ...] = ()  # of the tensor
    cell: int = CELL  # elements of a cell
    based: bool = True  # whether there is a base


class Operator(BaseModel):
    """A method from weights to weights: fields are parameters, `merge` is the formula."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    base: ClassVar[Base] = Base.REQUIRED
    tuned: ClassVar[tuple[int, int | None]] = (1, None)  # how many models besides a required base
    yields_delta: ClassVar[bool] = True  # `merge` returns a delta to the base, if there is one,
    # else values
    without_effect: ClassVar[Mapping[str, str]] = {}  # words that mergekit takes for this method
    # and never reads: why. A plan that holds one is refused.

    @property
    def grain(self) -> Grain:
        """Return how much of a tensor must be seen at once."""
        return Grain.ELEMENT

    def seated(self, model: Mapping[str, Place]) -> Operator:
        """Return the operator for an output of these parameters, where it must know them all."""
        return self

    def scratch(self, k: int) -> int:
        """Return how many rows of scratch a block of k models needs."""
        return 0

    def survey(self, about: About) -> Survey:
        """Reduce what must be known before `merge`; the finding is None where nothing must."""
        return _nothing()

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        """Say whether the survey streams one tensor or the whole model."""
        return "tensor"

    def same_everywhere(self) -> Any:
        """Return what must not differ between tensors, because one survey serves them all."""
        return None

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the model whose values come out unchanged (-1: the base), where one does."""
        return None

    def table(self, name: str, place: Place) -> dict[str, Any]:
        """Return what a report shows of a tensor, by column; a tuple has a value for each model."""
        return self.model_dump(by_alias=True)

    def merge(self, block: Block, finding: Finding) -> Tensor:
        """Return (n,) the merged delta or values of one block."""
        raise TypeError(f"{type(self).__name__} does not merge")

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the same in float64 over whole tensors, as plain expressions."""
        raise TypeError(f"{type(self).__name__} does not merge")


def _nothing() -> Survey:
    """Find None without a pass."""
    yield from ()
    return None


class Adjustment(Operator):
    """An operator that may also stand under `then:`, after a merge that made a delta."""

    def adjust(self, block: Block, finding: Finding) -> Tensor:
        """Return (n,) the new delta from `block.delta`."""
        raise TypeError(f"{type(self).__name__} cannot stand under `then:`")

    def follow(self, about: About) -> Survey:
        """Reduce, over the whole model, what must be known before `adjust`."""
        return _nothing()

    def neutral(self, name: str, place: Place) -> bool:
        """Say whether `adjust` leaves the delta of this tensor as it is."""
        return False

    def reference_adjust(self, delta: Tensor, about: About) -> Tensor:
        """Return `adjust` in float64 over a whole tensor."""
        raise TypeError(f"{type(self).__name__} cannot stand under `then:`")
