"""Plans of methods that train or edit: read with all their faults, methods made of their words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from mergekit_ft import registry
from mergekit_ft.errors import Fault, PlanError
from mergekit_ft.plan import marks
from mergekit_ft.plan.fields import REQUIRED, accepted, listed, parameters_of, shown
from mergekit_ft.plan.marks import Keys, Marks
from mergekit_ft.plan.models import Step
from mergekit_ft.plan.reader import load
from mergekit_ft.plan.references import PlanWords, refuse
from mergekit_ft.registry import did_you_mean


def _method(raw: Any) -> Any:
    if isinstance(raw, Step):
        return raw
    if not isinstance(raw, str | dict) or (isinstance(raw, dict) and len(raw) != 1):
        refuse("a method is its name, or its name with parameters: `lift: {rank: 64}`")
    return Step.model_validate(raw)


Method = Annotated[Step, BeforeValidator(_method)]


@dataclass
class MethodsReading:
    """The words of a plan, where they stand, and every fault found in them."""

    words: dict[str, Any] | None  # None: nothing that can be read
    marks: Marks
    file: str
    text: str
    faults: list[Fault] = field(default_factory=list)

    def add(self, path: Keys, message: str, *, key: bool = False, kind: str = "plan") -> None:
        """Add a fault to the report, once."""
        mark = self.marks.nearest(path)
        line, column = (mark.key_line, mark.key_column) if key else (mark.line, mark.column)
        named = self.marks.label(path)
        told = message if line or not named else f"{named}: {message}"
        fault = Fault(told, self.file, line, column, kind)
        if fault not in self.faults:
            self.faults.append(fault)


def words_of(plan: str | os.PathLike[str] | Mapping[str, Any]) -> MethodsReading:
    """Return the words of a plan given as a file, as YAML text, or as a mapping."""
    if isinstance(plan, Mapping):
        tree, file = marks.of_value(dict(plan)), "plan"
        text = yaml.safe_dump(tree.value, sort_keys=False)
    else:
        text, file = load(plan)
        tree = marks.parse(text, file)
    reading = MethodsReading(None, tree.marks, file, text, list(tree.faults))
    if isinstance(tree.value, dict):
        reading.words = tree.value
    elif tree.value is not None or not tree.faults:
        reading.add((), f"a plan is a mapping of keys to values; got {shown(tree.value)}")
    return reading


def built(kind: type[PlanWords], reading: MethodsReading, examples: Mapping[str, str]) -> Any:
    """Return the plan that the words make; None where something is wrong with them.

    `examples` say of a key that is missing what it is for.
    """
    try:
        return kind.model_validate(reading.words)
    except ValidationError as error:
        for details in error.errors():
            _tell(details, reading, kind, examples)
        return None


def _tell(
    details: ErrorDetails,
    reading: MethodsReading,
    kind_of_plan: type[BaseModel],
    examples: Mapping[str, str],
) -> None:
    """Put one of pydantic's errors in our words, at its place."""
    path, kind = tuple(details["loc"]), details["type"]
    key = str(path[-1])
    if kind == "plan":
        context = details.get("ctx", {})
        reading.add((*path, *context.get("at", ())), str(context["message"]))
    elif kind == "extra_forbidden":
        valid = list(_words_at(kind_of_plan, path[:-1]))
        hint = did_you_mean(key, valid)
        reading.add(path, f"unknown key '{key}'{hint} (valid: {', '.join(valid)})", key=True)
    elif kind == "missing":
        reading.add(path[:-1], f"missing key '{key}': {examples.get(key, f'write `{key}:`')}")
    elif kind == "model_type":
        reading.add(path, f"{key} is a mapping of keys to values; got {shown(details['input'])}")
    else:
        reading.add(path, f"{key} must be {accepted(details)}; got {shown(details['input'])}")


def _words_at(kind: type[BaseModel], path: Keys) -> Iterator[str]:
    for step in path:
        kind = cast(type[BaseModel], kind.model_fields[str(step)].annotation)
    yield from kind.model_fields


def made(reading: MethodsReading, word: str, usual: str | None = None) -> Any:
    """Return the method of a kind that the plan names, or None where that cannot be made.

    What is wrong with its parameters is added to the faults; what is no method's name at all has
    been told by `built`.
    """
    try:
        step = _method((reading.words or {}).get(word, usual))
    except Exception:
        return None
    return _made(step, word, reading)


def _made(step: Step, word: str, reading: MethodsReading) -> Any:
    """Return a method with its parameters; None where something is wrong with them."""
    try:
        method: Any = registry.of_kind(step.method, word)
    except PlanError as error:
        named: Keys = (word, step.method)
        at = named if named in reading.marks else (word,)
        reading.add(at, "; ".join(fault.message for fault in error.faults), key=at == named)
        return None
    known, values, before = parameters_of(method), {}, len(reading.faults)
    for name, raw in step.parameters.items():
        path: Keys = (word, step.method, name)
        if name not in known:
            hint = did_you_mean(name, known)
            reading.add(path, f"unknown key '{name}'{hint} {listed(method, step.method)}", key=True)
            continue
        try:
            values[name] = known[name].value(raw)
        except ValueError as error:
            reading.add(path, str(error))
    for name, parameter in known.items():
        if parameter.default is REQUIRED and name not in step.parameters:
            reading.add((word,), f"{step.method} needs `{name}:` ({parameter.description})")
    if len(reading.faults) > before:
        return None
    try:
        return method(**values)
    except ValidationError as error:
        told = "; ".join(str(e.get("ctx", {}).get("error", e["msg"])) for e in error.errors())
        reading.add((word, step.method), told)
        return None
