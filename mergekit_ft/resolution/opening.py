"""Every model that a plan names, opened once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_ft.errors import Fault, PlanError, SourceError
from mergekit_ft.plan import ModelReference, Plan, Reading
from mergekit_ft.sources import Source, open_source

Key = tuple[str, str | None]  # `ModelReference.key`
Opened = Mapping[Key, Source]


def opened(reading: Reading, opening: Mapping[str, Any]) -> Opened:
    """Open each model of a plan; raises every fault known so far where one cannot be opened."""
    found: dict[Key, Source] = {}
    for path, model in named_models(reading.plan):
        if model.key not in found:
            try:
                found[model.key] = open_source(model.path, model.revision, **opening)
            except SourceError as error:
                reading.add(path, str(error), kind="source")
    named = [model.key for _, model in named_models(reading.plan)]
    if not named or any(key not in found for key in named):
        for source in found.values():
            source.close()
        raise_faults(reading.faults or [Fault("the plan names no model", reading.file)])
    return found


def named_models(plan: Plan | None) -> Iterable[tuple[tuple[str | int, ...], ModelReference]]:
    """Yield every model and the path of the words that name it, the donor first."""
    if plan is None:
        return
    if plan.base_model is not None:
        yield ("base_model",), plan.base_model
    for i, entry in enumerate(plan.models):
        yield ("models", i, "model"), entry.model


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise all faults as one error: of the sources where only they are at fault."""
    if faults:
        report = PlanError(faults)
        if all(fault.kind == "source" for fault in faults):
            raise SourceError(str(report))
        raise report
