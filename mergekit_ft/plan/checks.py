"""Whether a method can merge what a plan gives it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mergekit_ft import registry
from mergekit_ft.errors import PlanError
from mergekit_ft.plan.entries import InputSlice
from mergekit_ft.plan.levels import members
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.parts import Part, parts
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.references import Key

if TYPE_CHECKING:
    from mergekit_ft.contract import Operator


def method_of(reading: Reading) -> type[Operator] | None:
    """Return the class that the plan names; a fault, and the nearest one, where there is none."""
    assert reading.plan is not None
    if not reading.plan.merge_method:
        return None
    try:
        return registry.method(reading.plan.merge_method)
    except PlanError as error:
        reading.add(("merge_method",), _said(error))
        nearest = registry.nearest(reading.plan.merge_method, registry.names("operator"), most=1)
        if not nearest:
            return None
        reading.plan = reading.plan.model_copy(update={"merge_method": nearest[0]})
        return registry.method(nearest[0])  # so that its parameters are checked as well


def check_models(reading: Reading, method: type[Operator]) -> None:
    """Report too few or too many models in a part of the plan, and a missing base."""
    from mergekit_ft.contract import Base

    assert reading.plan is not None
    for part in parts(reading.plan):
        if method.base is Base.REQUIRED and part.base is None:
            if "base_model" not in reading.torn:
                message = f"{reading.plan.merge_method} needs `base_model:`, which the others were"
                reading.add(("merge_method",), f"{message} tuned from")
        elif part.items and not _is_torn(reading, part.path):
            _check_count(reading, method, part, len(members(part, method)))


def _is_torn(reading: Reading, path: Keys) -> bool:
    """Say whether a list lost an item to a fault."""
    label = re.escape(reading.marks.label(path))
    return any(re.fullmatch(rf"{label}(\[[0-9]+\])?", torn) for torn in reading.torn)


def check_slices(reading: Reading) -> None:
    """Report output slices whose sources have unlike numbers of layers."""
    assert reading.plan is not None
    for part in parts(reading.plan):
        if part.sliced and not part.items and not _is_torn(reading, part.path):
            reading.add(part.path, "an output slice without sources has no layers", key=True)
        for i, other in enumerate(part.slices):
            first = part.slices[0]
            if length(other) == length(first):
                continue
            line = reading.marks.nearest((*part.path, 0, "layer_range")).line
            where = f" (line {line})" if line else ""
            message = f"layer_range of {other.model} takes {length(other)} layers, that of "
            message += f"{first.model} {length(first)}{where}; the sources of an output slice "
            reading.add((*part.path, i, "layer_range"), f"{message}take equally many")


def check_modules(reading: Reading) -> None:
    """Report modules that list nothing, or both models and slices."""
    assert reading.plan is not None
    for name, module in reading.plan.modules.items():
        path: Keys = ("modules", name)
        torn = any(_is_torn(reading, (*path, word)) for word in ("models", "slices"))
        if module.models and module.slices:
            message = f"module '{name}' has both models and slices; keep one"
            reading.add((*path, "slices"), message, key=True)
        elif not module.models and not module.slices and not torn:
            message = f"module '{name}' has neither models nor slices; list one"
            reading.add(path, message, key=True)


def length(item: InputSlice) -> int:
    """Return how many layers a slice has."""
    return item.layer_range[1] - item.layer_range[0]


def check_then(reading: Reading) -> None:
    """Report `then:` in a plan without a base, for there is no delta to work on."""
    plan = reading.plan
    if plan is None or not plan.then or "base_model" in reading.torn:
        return
    if any(part.base is None for part in parts(plan)):
        message = "then works on the delta to a base: it needs `base_model:`"
        reading.add(("then",), message, key=True)


def adjustments(reading: Reading) -> dict[int, type[Operator]]:
    """Return the operators under `then:` by their position; a fault for each that cannot be."""
    from mergekit_ft.contract import Adjustment

    assert reading.plan is not None
    found: dict[int, type[Operator]] = {}
    for i, step in enumerate(reading.plan.then):
        path = ("then", i, step.method)
        try:
            method = registry.method(step.method)
        except PlanError as error:
            reading.add(path, _said(error), key=True)
            continue
        if issubclass(method, Adjustment):
            found[i] = method
            continue
        can = ", ".join(_adjustment_names()) or "no method"
        message = f"'{step.method}' cannot stand under then: it makes a delta (these can: {can})"
        reading.add(path, message, key=True)
    return found


def _adjustment_names() -> list[str]:
    from mergekit_ft.contract import Adjustment

    known = registry.names("operator")
    return [name for name in known if issubclass(registry.method(name), Adjustment)]


def _said(error: PlanError) -> str:
    return "; ".join(fault.message for fault in error.faults)


def check_twice(reading: Reading) -> None:
    """Report a model that is listed twice in a part of the plan."""
    assert reading.plan is not None
    for part in parts(reading.plan):
        first: dict[Key, int] = {}
        for i, item in enumerate(part.items):
            j = first.setdefault(item.model.key, i)
            if j == i:
                continue
            line = reading.marks.nearest((*part.path, j, "model")).line
            label = reading.marks.label((*part.path, j))
            where = f"first on line {line}" if line else f"first as {label}"
            message = f"model {item.model} is listed twice ({where}); keep one"
            reading.add((*part.path, i, "model"), message)


def _check_count(reading: Reading, method: type[Operator], part: Part, count: int) -> None:
    from mergekit_ft.contract import Base

    low, high = method.tuned
    if low <= count and (high is None or count <= high):
        return
    assert reading.plan is not None
    wanted = f"at least {low}" if high is None else f"{low}" if low == high else f"{low} to {high}"
    apart = method.base is Base.REQUIRED or (method.base is Base.OPTIONAL and part.base is not None)
    besides = " besides base_model" if apart else ""
    noun = "model" if wanted.endswith("1") else "models"
    whose = "this slice" if part.sliced else "the plan"
    message = f"{reading.plan.merge_method} takes {wanted} {noun}{besides}; {whose} gives {count}"
    reading.add(part.path, message, key=True)
