"""What a plan lists: whole models, or slices of their layers, or either for each module."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mergekit_ft.plan.fields import shown
from mergekit_ft.plan.prefixes import Prefixes
from mergekit_ft.plan.references import ModelReference, Named, PlanWords, refuse


def _mapping(raw: Any) -> Any:
    if not isinstance(raw, dict | None):
        refuse("parameters is a mapping of names to values")
    return raw or {}


def _layers(raw: Any) -> Any:
    """Return [first, end): at least one layer, counted from 0."""
    numbers = isinstance(raw, list | tuple) and all(type(number) is int for number in raw)
    if not numbers or len(raw) != 2:
        got = raw if isinstance(raw, list) and len(raw) < 5 else shown(raw)
        refuse(f"layer_range is [first, end], the end not included; got {got}")
    first, end = raw
    if first < 0 or end < 0:
        refuse(f"layer_range [{first}, {end}] is negative; layers count from 0")
    if first == end:
        refuse(f"layer_range [{first}, {end}] is empty; layer {first} is [{first}, {first + 1}]")
    if first > end:
        refuse(f"layer_range [{first}, {end}] runs backwards; write [{end}, {first}]")
    return tuple(raw)


Parameters = Annotated[dict[str, Any], BeforeValidator(_mapping)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_layers)]


class Entry(Named):
    """One of the models and its own parameters."""

    parameters: Parameters = Field(default_factory=dict)
    prefix: Prefixes = None  # how its names begin -> how they begin in the donor


class InputSlice(Named):
    """Layers of one of the models, and its own parameters."""

    layer_range: LayerRange
    parameters: Parameters = Field(default_factory=dict)


class OutputSlice(PlanWords):
    """Layers of the output: those of its sources, merged."""

    sources: tuple[InputSlice, ...]
    base_model: ModelReference | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(PlanWords):
    """One part of a model that has several stacks of layers."""

    models: tuple[Entry, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    base_model: ModelReference | None = None
    parameters: Parameters = Field(default_factory=dict)


Item = Entry | InputSlice
