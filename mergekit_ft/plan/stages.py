"""The documents of a plan: stages that others name as their models, and the one that is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.references import ModelReference
from mergekit_ft.registry import did_you_mean


def references(node: Any, path: Keys = ()) -> Iterator[tuple[Keys, ModelReference]]:
    """Yield every model that a plan names, with the path of its words."""
    if isinstance(node, ModelReference):
        yield path, node
    elif isinstance(node, BaseModel):
        for word in type(node).model_fields:
            yield from references(getattr(node, word), (*path, word))
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from references(value, (*path, key))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from references(value, (*path, i))


def linked(readings: Sequence[Reading]) -> Reading:
    """Return the reading of the document that is written; the others are its stages by name."""
    if len(readings) == 1:
        return readings[0]
    stages = _named(readings)
    for reading in readings:
        reading.stages = stages
        _check_references(reading)
    output = _output(readings, stages)
    _check_circles(stages)
    _check_all_used(output, stages)
    return output


def _named(readings: Sequence[Reading]) -> dict[str, Reading]:
    """Return the stages by name; a fault where two share one, or it cannot be a model's."""
    stages: dict[str, Reading] = {}
    for reading in readings:
        name = reading.plan.name if reading.plan is not None else None
        if name is None:
            continue
        if name in stages:
            line = stages[name].marks.nearest(("name",)).line
            where = f" (first on line {line})" if line else ""
            reading.add(("name",), f"two documents are named '{name}'{where}; rename one")
            continue
        if not name or set(name) & set("@+") or name != name.strip():
            message = f"'{name}' cannot name a stage: other documents name it as a model"
            reading.add(("name",), f"{message}, without '@', '+' or spaces at its ends")
        stages[name] = reading
    return stages


def _check_references(reading: Reading) -> None:
    for path, model in references(reading.plan):
        if model.path in reading.stages:
            _check_reference(reading, path, model)


def nearest_stage(reading: Reading, model: ModelReference) -> str:
    """Return what to say of a model that cannot be opened, in a plan that has stages."""
    if not reading.stages:
        return ""
    hint = did_you_mean(model.path, reading.stages)
    return f"; nor is it a stage of this plan{hint} (stages: {', '.join(reading.stages)})"


def _check_reference(reading: Reading, path: Keys, model: ModelReference) -> None:
    if os.path.exists(model.path):
        message = f"'{model.path}' is a stage of this plan and something at that path as well; "
        reading.add(path, f"{message}rename the stage, or write ./{model.path} for what is there")
    elif model.revision is not None:
        message = f"'{model.path}' is a stage of this plan, which has no revision; "
        reading.add(path, f"{message}drop '@{model.revision}'")
    elif model.adapter is not None or model.delta is not None:
        word = "adapter" if model.adapter is not None else "delta"
        message = f"'{model.path}' is a stage of this plan, which takes no {word}; "
        on = model.adapter or model.delta
        reading.add(path, f"{message}put '{on}' on the models that it merges")


def _output(readings: Sequence[Reading], stages: Mapping[str, Reading]) -> Reading:
    """Return the document without a name, or the one that no other uses."""
    unnamed = [r for r in readings if r.plan is None or r.plan.name is None]
    for other in unnamed[1:]:
        if other.plan is not None and unnamed[0].plan is not None:
            message = "a second document without `name:`; only the output may have none"
            other.add((), message)
    if unnamed:
        return unnamed[-1]
    used = {name for reading in readings for name in _uses(reading)}
    ends = [name for name in stages if name not in used]
    for name in ends[:-1]:
        message = f"no other document uses '{name}', nor '{ends[-1]}', and one is written; leave "
        stages[name].add(
            ("name",), f"{message}out what is not wanted, or make it a plan of its own"
        )
    return stages[ends[-1]] if ends else readings[-1]


def _uses(reading: Reading) -> list[str]:
    """Return the stages that a document names, in the order of its words."""
    found = (model.path for _, model in references(reading.plan))
    return [name for name in dict.fromkeys(found) if name in reading.stages]


def _check_circles(stages: Mapping[str, Reading]) -> None:
    """Report the reference that closes each circle."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in done:
            return
        for path, model in references(stages[name].plan):
            if model.path in (*trail, name):
                circle = (*trail, name)[(*trail, name).index(model.path) :]
                said = " <- ".join((*circle, model.path))
                stages[name].add(path, f"stages need each other in a circle: {said}")
            elif model.path in stages:
                visit(model.path, (*trail, name))
        done.add(name)

    for name in stages:
        visit(name, ())


def _check_all_used(output: Reading, stages: Mapping[str, Reading]) -> None:
    if output.plan is None or output.plan.name is not None:
        return  # of those with names, the output is the one that no other uses
    used, left = set(_uses(output)), _uses(output)
    while left:
        more = [name for name in _uses(stages[left.pop()]) if name not in used]
        used.update(more)
        left += more
    for name, reading in stages.items():
        if name not in used and reading is not output:
            message = f"'{name}' has no effect: nothing that is written uses it; remove it"
            reading.add(("name",), message)
