"""What a method of fusion owes and is owed: what models say in, a weight for each expert out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor


@dataclass(frozen=True)
class Heard:
    """What models said at n places: float32 logits, or log-probabilities, which fuse alike."""

    base: Tensor  # (n, vocabulary) of the model that is moved
    small: Tensor  # (n, vocabulary) of what the experts were tuned from: perhaps `base` itself
    tuned: Tensor  # (k, n, vocabulary) of the experts
    targets: Tensor  # (n,) the tokens that came
    weights: Tensor  # (n,) float64 of the places
    teacher: Tensor | None = None  # (n, vocabulary) of a model to come near to


class Hearing(Protocol):
    """Places that can be gone through again and again."""

    @property
    def experts(self) -> int:
        """Return how many experts are heard, k."""

    def __iter__(self) -> Iterator[Heard]:
        """Yield the places, a few at a time."""


@dataclass(frozen=True)
class Fitted:
    """Weights of the experts, and how they were found."""

    alpha: tuple[float, ...]  # (k,)
    facts: Mapping[str, Any] = field(default_factory=dict)  # what JSON can hold


class Fusion(BaseModel):
    """A method from logits to weights: fields are its parameters.

    Its weights depend on neither the order of the places nor how they are split.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    @property
    def taught(self) -> bool:
        """Say whether it needs a teacher."""
        return False

    def fit(self, hearing: Hearing) -> Fitted:
        """Return a weight for each expert."""
        raise TypeError(f"{type(self).__name__} fits nothing")
