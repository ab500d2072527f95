"""What editors that solve owe and are owed: a model whose matrices are memories, keys to values.

Of n edits, t* is the last token of each one's subject. The key of an edit at a layer is what the
layer's matrix (the one that ends its MLP) is given there; the value is what comes out of it, or
what leaves the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

Part = Literal["matrix", "layer"]  # whose output is the value


@dataclass(frozen=True)
class Descent:
    """How the value that makes a model say a target is found."""

    steps: int  # looks at the loss; the last is not followed by a step
    rate: float  # of Adam
    decay: float
    clamp: float  # most that a value may move, by its own norm
    divergence: float


class Memory(Protocol):
    """A model and the edits that are to be written into it."""

    @property
    def count(self) -> int:
        """Return how many edits there are."""

    @property
    def layers(self) -> int:
        """Return how many layers the model has."""

    def some(self, start: int, stop: int) -> Memory:
        """Return the same model with some of the edits."""

    def wanted(self, layer: int, part: Part, how: Descent) -> Tensor:
        """Return (h, n) values with which the model as it is would say the targets."""

    def values(self, layer: int, part: Part) -> Tensor:
        """Return (h, n) values that the model as it is has in the prompts alone."""

    def keys(self, layer: int, alone: float) -> Tensor:
        """Return (d_in, n) keys: `alone` of the prompt alone, the rest the mean over contexts."""

    def answers(self, layer: int, keys: Tensor) -> Tensor:
        """Return (h, n) what the matrix answers to (d_in, n) keys."""

    def second(self, layer: int) -> Tensor:
        """Return (d_in, d_in) float64 E[k k^T] over text, in the model before any edit."""

    def write(self, layer: int, update: Tensor) -> None:
        """Add (h, d_in) to a layer's matrix."""


class Solver(BaseModel):
    """An editor that finds values and solves for them: fields are its parameters."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    contexts: ClassVar[tuple[tuple[int, int], ...]]  # (tokens, texts an opening) before a prompt
    span: ClassVar[tuple[float, float]]  # of the layers, as shares of depth, where none are given

    layers: tuple[int, ...] | None = Field(None, description="that are written, ascending")
    steps: int = Field(25, ge=1, description="looks at the loss while a value is sought")
    rate: float = Field(0.5, gt=0, description="of Adam, which seeks it")
    decay: float = Field(0.5, ge=0, description="weight of a move's size in the loss")
    clamp: float = Field(0.75, gt=0, description="most that a value moves, by its own norm")
    divergence: float = Field(0.0625, ge=0, description="weight of the KL term")

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(f"layers ascend, each once; got {list(layers)}")
        return layers

    @property
    def descent(self) -> Descent:
        """Return how values are sought."""
        return Descent(self.steps, self.rate, self.decay, self.clamp, self.divergence)

    @property
    def wants_statistics(self) -> bool:
        """Say whether it needs E[k k^T]."""
        return True

    def written(self, count: int) -> Sequence[int]:
        """Return which of a model's layers are written, ascending."""
        if self.layers is not None:
            return self.layers
        first, last = (min(round(share * count), count - 1) for share in self.span)
        return range(first, last + 1)

    def solve(self, memory: Memory) -> None:
        """Write the edits."""
        raise TypeError(f"{type(self).__name__} does not solve")
