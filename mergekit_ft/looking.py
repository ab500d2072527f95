"""What a probe owes and is owed: checkpoints in, findings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mergekit_ft.layers import Place

Finding = dict[str, Any]  # of one tensor: what JSON can hold


@dataclass(frozen=True)
class Seen:
    """A tensor of every model that a probe looks at."""

    name: str
    place: Place
    shape: tuple[int, ...]
    transposed: bool  # whether a matrix is stored (in, out)
    whole: tuple[Tensor, ...] = ()  # one a model, in its shape, float64; where a probe sees them so
    sums: tuple[float, ...] = ()  # of what `reduce` made of every cell; where it does not


class Probe(BaseModel):
    """A method that looks at checkpoints: fields are its parameters."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    takes: ClassVar[tuple[int, int | None]] = (2, 2)  # how many models, in order
    sees_whole: ClassVar[bool] = False  # whether it must see a tensor at once
    columns: ClassVar[tuple[str, ...]] = ()  # of a finding, that a report shows, the first as a map
    unit: ClassVar[str] = ""  # of the first column

    def wants(self, name: str, place: Place, shape: tuple[int, ...]) -> bool:
        """Say whether a tensor is looked at."""
        return True

    def reduce(self, rows: Tensor) -> Tensor:
        """Return (s,) float64 sums over a cell, (k, n) float64 of it from each model."""
        raise TypeError(f"{type(self).__name__} reduces nothing")

    def look(self, seen: Seen) -> Finding:
        """Return what is found of one tensor."""
        raise TypeError(f"{type(self).__name__} finds nothing")

    def conclude(self, findings: Sequence[tuple[Seen, Finding]]) -> Mapping[str, Any]:
        """Return what is found of the whole model."""
        return {}

    def listed(self, findings: Sequence[tuple[Seen, Finding]]) -> list[str]:
        """Return modules that the findings name, as patterns, for `--write`."""
        return []
