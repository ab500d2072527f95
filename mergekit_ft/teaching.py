"""What editors that train owe and are owed: a model that is taught texts by a few tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


@dataclass(frozen=True)
class Graded:
    """How a model fares on n texts."""

    sums: Tensor  # (n,) float32 -log p of the scored tokens, summed
    tokens: Tensor  # (n,) how many are scored
    weights: Tensor  # (n,) of the texts

    def mean(self, *, by_token: bool = False) -> Tensor:
        """Return the weighted mean over texts of their tokens' mean, or over tokens."""
        if by_token:
            return (self.weights * self.sums).sum() / (self.weights * self.tokens).sum()
        return (self.weights * self.sums / self.tokens).sum() / self.weights.sum()


class Pupil(Protocol):
    """A model and the texts that it is taught."""

    @property
    def count(self) -> int:
        """Return how many texts there are."""

    @property
    def anchors(self) -> int:
        """Return at how many prompts it should go on to say what it said."""

    @property
    def masters(self) -> Sequence[nn.Parameter]:
        """Return what trains, in float32."""

    def grade(self, rows: Sequence[int]) -> Graded:
        """Return how it fares on some texts, with gradients."""

    def drift(self, rows: Sequence[int]) -> Tensor:
        """Return the mean of KL(before || now) at some anchors, with gradients."""

    def say(self, line: str) -> None:
        """Tell who watches how far it is."""


class Teacher(BaseModel):
    """An editor that trains: fields are its parameters."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    layer: Annotated[int, Field(ge=0)] | Literal["search"] | None = Field(
        None, description="that is tuned; None: at 0.70 of the depth; search: tried on a few edits"
    )
    module: str = Field(
        "down_proj",
        description="of it: down_proj, up_proj, mlp, attention, layer, or a pattern of names",
    )
    prefixes: int = Field(0, ge=0, description="times that an edit is taught behind other text too")
    precision: Literal["float32", "base"] | None = Field(
        None, description="of what does not train; None: float32 on the CPU, else the base's"
    )

    @property
    def anchored(self) -> bool:
        """Say whether it looks at what should stay."""
        return False

    def batch_of(self, count: int) -> int:
        """Return how many of so many texts are taught in a step."""
        raise TypeError(f"{type(self).__name__} does not teach")

    def shortened(self, share: float, count: int) -> Teacher:
        """Return an editor that teaches so many texts for a share of the time."""
        raise TypeError(f"{type(self).__name__} does not teach")

    def teach(self, pupil: Pupil, seed: int) -> list[dict[str, Any]]:
        """Train, and return the curve: a mapping an epoch."""
        raise TypeError(f"{type(self).__name__} does not teach")
