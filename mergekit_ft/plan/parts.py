"""The parts of a plan: models that are merged with one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ft.plan.entries import InputSlice, Item, Module, OutputSlice
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.models import Plan
from mergekit_ft.plan.references import ModelReference


@dataclass(frozen=True)
class Part:
    """All models of a plan or of a module, or the sources of one output slice."""

    path: Keys  # of the list: ("models",) or ("slices", 0, "sources")
    items: tuple[Item, ...]
    base: ModelReference | None
    base_path: Keys
    levels: tuple[tuple[Keys, Mapping[str, Any]], ...]  # parameters for all, the nearest first
    module: str | None = None

    @property
    def sliced(self) -> bool:
        """Say whether it is of an output slice."""
        return self.path[-1] == "sources"

    @property
    def slices(self) -> tuple[InputSlice, ...]:
        """Return its items where they are slices."""
        return tuple(item for item in self.items if isinstance(item, InputSlice))


def parts(plan: Plan) -> list[Part]:
    """Return a plan's parts in the order of the output."""
    top = (("parameters",), plan.parameters)
    found = []
    if plan.models:
        whole = Part(("models",), plan.models, plan.base_model, ("base_model",), (top,))
        found.append(whole)
    whole = Part((), (), plan.base_model, ("base_model",), (top,))
    found += _sliced(plan.slices, (), whole)
    for name, module in plan.modules.items():
        found += _of_module(name, module, whole)
    return found


def _sliced(slices: tuple[OutputSlice, ...], path: Keys, around: Part) -> Iterator[Part]:
    for i, output in enumerate(slices):
        at: Keys = (*path, "slices", i)
        own = output.base_model is not None
        yield Part(
            (*at, "sources"),
            output.sources,
            output.base_model if own else around.base,
            (*at, "base_model") if own else around.base_path,
            (((*at, "parameters"), output.parameters), *around.levels),
            around.module,
        )


def _of_module(name: str, module: Module, plan: Part) -> Iterator[Part]:
    at: Keys = ("modules", name)
    own = module.base_model is not None
    base = module.base_model if own else plan.base
    base_path: Keys = (*at, "base_model") if own else plan.base_path
    levels = (((*at, "parameters"), module.parameters), *plan.levels)
    if module.models:
        yield Part((*at, "models"), module.models, base, base_path, levels, name)
    yield from _sliced(module.slices, at, Part((), (), base, base_path, levels, name))


def referred(plan: Plan | None) -> Iterator[tuple[Keys, ModelReference]]:
    """Yield every model whose weights a plan reads and the path of its words, the donor first."""
    if plan is None:
        return
    if plan.base_model is not None:
        yield ("base_model",), plan.base_model
    for part in parts(plan):
        if part.base is not None and part.base_path != ("base_model",):
            yield part.base_path, part.base
        for i, item in enumerate(part.items):
            yield (*part.path, i, "model"), item.model
