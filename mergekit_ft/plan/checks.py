"""Whether a method can merge what a plan gives it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mergekit_ft import registry
from mergekit_ft.errors import PlanError
from mergekit_ft.plan.levels import members
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
        nearest = registry.nearest(reading.plan.merge_method, registry.names(), most=1)
        if not nearest:
            return None
        reading.plan = reading.plan.model_copy(update={"merge_method": nearest[0]})
        return registry.method(nearest[0])  # so that its parameters are checked as well


def check_models(reading: Reading, method: type[Operator]) -> None:
    """Report too few or too many models, and a missing base."""
    from mergekit_ft.contract import Base

    plan = reading.plan
    assert plan is not None
    if method.base is Base.REQUIRED and plan.base_model is None:
        if "base_model" not in reading.torn:
            message = f"{plan.merge_method} needs `base_model:`, which the others were tuned from"
            reading.add(("merge_method",), message)
        return
    if not any(re.fullmatch(r"models(\[[0-9]+\])?", label) for label in reading.torn):
        _check_count(reading, method, len(members(plan, method)))


def check_then(reading: Reading) -> None:
    """Report `then:` in a plan without a base, for there is no delta to work on."""
    plan = reading.plan
    if plan and plan.then and plan.base_model is None and "base_model" not in reading.torn:
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

    return [name for name in registry.names() if issubclass(registry.method(name), Adjustment)]


def _said(error: PlanError) -> str:
    return "; ".join(fault.message for fault in error.faults)


def check_twice(reading: Reading) -> None:
    """Report a model that is listed twice."""
    assert reading.plan is not None
    first: dict[Key, int] = {}
    for i, entry in enumerate(reading.plan.models):
        j = first.setdefault(entry.model.key, i)
        if j != i:
            line = reading.marks.nearest(("models", j, "model")).line
            where = f"first on line {line}" if line else f"first as models[{j}]"
            message = f"model {entry.model} is listed twice ({where}); keep one"
            reading.add(("models", i, "model"), message)


def _check_count(reading: Reading, method: type[Operator], count: int) -> None:
    from mergekit_ft.contract import Base

    low, high = method.tuned
    if low <= count and (high is None or count <= high):
        return
    assert reading.plan is not None
    wanted = f"at least {low}" if high is None else f"{low}" if low == high else f"{low} to {high}"
    apart = method.base is Base.REQUIRED or (
        method.base is Base.OPTIONAL and reading.plan.base_model is not None
    )
    besides = " besides base_model" if apart else ""
    noun = "model" if wanted.endswith("1") else "models"
    message = f"{reading.plan.merge_method} takes {wanted} {noun}{besides}; the plan gives {count}"
    reading.add(("models",), message, key=True)
