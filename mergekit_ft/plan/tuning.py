"""What a tune plan may say, key by key, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from mergekit_ft import registry
from mergekit_ft.errors import Fault, PlanError
from mergekit_ft.plan import marks
from mergekit_ft.plan.fields import REQUIRED, accepted, listed, parameters_of, shown
from mergekit_ft.plan.marks import Keys, Marks
from mergekit_ft.plan.models import Step
from mergekit_ft.plan.reader import load
from mergekit_ft.plan.references import ModelReference, PlanWords, refuse
from mergekit_ft.registry import did_you_mean

if TYPE_CHECKING:
    from mergekit_ft.learning import Objective, Tuner

OUTPUTS = ("full", "delta", "adapter")
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
Rows = Literal["auto", "raw", "chat"]


def _files(raw: Any) -> Any:
    given = [raw] if isinstance(raw, str) else raw
    if not isinstance(given, list) or not given or not all(isinstance(f, str) for f in given):
        refuse(f"a JSONL file, or a list of them; got {shown(raw)}")
    return tuple(given)


def _validation(raw: Any) -> Any:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float | list | None):
        refuse(f"validation is a JSONL file or a share of the training rows; got {shown(raw)}")
    if isinstance(raw, int | float) and not 0 < raw < 1:
        refuse(f"as a share of the training rows validation is between 0 and 1; got {raw}")
    return _files(raw) if isinstance(raw, str | list) else raw


def _method(raw: Any) -> Any:
    if isinstance(raw, Step):
        return raw
    if not isinstance(raw, str | dict) or (isinstance(raw, dict) and len(raw) != 1):
        refuse("a method is its name, or its name with parameters: `lift: {rank: 64}`")
    return Step.model_validate(raw)


def _warmup(raw: Any) -> Any:
    fine = isinstance(raw, int | float) and not isinstance(raw, bool) and raw >= 0
    if not fine or (isinstance(raw, float) and raw >= 1):
        refuse(f"warmup is a number of steps (10) or a share of them (0.1); got {shown(raw)}")
    return raw


Files = Annotated[tuple[str, ...], BeforeValidator(_files)]
Method = Annotated[Step, BeforeValidator(_method)]


class DataWords(PlanWords):
    """What is learned from."""

    train: Files
    validation: Annotated[Any, BeforeValidator(_validation)] = None  # files, a share, or None
    rows: Rows = "auto"  # how prompt and completion become text: as they are, or as a chat
    max_length: Annotated[int, Field(ge=2)] = 1024  # tokens of a row
    packing: bool = False  # of `text` rows: joined, and cut to max_length


class TrainingWords(PlanWords):
    """How the training goes."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None  # of the optimizer; else epochs decide
    batch: Annotated[int, Field(ge=1)] = 8  # rows at a time
    accumulation: Annotated[int, Field(ge=1)] = 1  # batches a step
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # the peak; None: the tuner's
    schedule: Schedule = "cosine"
    warmup: Annotated[float, BeforeValidator(_warmup)] = 0.03  # a share of the steps, or steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0  # most that the gradient's norm may be; 0: no bound
    seed: int = 0
    precision: Precision = "auto"  # of products; weights that train are float32
    gradient_checkpointing: bool = False
    evaluate_every: Annotated[int, Field(ge=1)] | None = None  # steps; None: at the end
    early_stop: Annotated[int, Field(ge=1)] | None = None  # evaluations without a gain
    save_every: Annotated[int, Field(ge=1)] | None = None  # steps, for --resume; None: ten times
    log_every: Annotated[int, Field(ge=1)] = 10  # steps


class TunePlan(PlanWords):
    """What is asked of a fine-tuning."""

    base: ModelReference
    data: DataWords
    tuner: Method
    objective: Method = Step.model_validate("sft")
    training: TrainingWords = TrainingWords()
    output: Literal["full", "delta", "adapter"] | None = None  # None: the tuner's usual one

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """Return the plan as it was written."""
        return self._text


@dataclass
class TuneReading:
    """A tune plan, its methods, and every fault found in it."""

    plan: TunePlan | None
    marks: Marks
    file: str
    text: str
    faults: list[Fault] = field(default_factory=list)
    tuner: Tuner | None = None
    objective: Objective | None = None

    def add(self, path: Keys, message: str, *, key: bool = False, kind: str = "plan") -> None:
        """Add a fault to the report, once."""
        mark = self.marks.nearest(path)
        line, column = (mark.key_line, mark.key_column) if key else (mark.line, mark.column)
        named = self.marks.label(path)
        told = message if line or not named else f"{named}: {message}"
        fault = Fault(told, self.file, line, column, kind)
        if fault not in self.faults:
            self.faults.append(fault)

    def accepted(self) -> tuple[TunePlan, Tuner, Objective]:
        """Return the plan and its methods, or raise every fault found."""
        if self.faults or self.plan is None or self.tuner is None or self.objective is None:
            raise PlanError(self.faults or "the plan holds nothing that can be used")
        return self.plan, self.tuner, self.objective


def read_tune(plan: str | os.PathLike[str] | Mapping[str, Any]) -> TuneReading:
    """Return a tune plan given as a file, as YAML text, or as a mapping, and all its faults."""
    if isinstance(plan, Mapping):
        tree, file = marks.of_value(dict(plan)), "plan"
        text = yaml.safe_dump(tree.value, sort_keys=False)
    else:
        text, file = load(plan)
        tree = marks.parse(text, file)
    reading = TuneReading(None, tree.marks, file, text, list(tree.faults))
    if tree.value is None and tree.faults:
        return reading
    if not isinstance(tree.value, dict):
        reading.add((), f"a plan is a mapping of keys to values; got {shown(tree.value)}")
        return reading
    _build(tree.value, reading)
    _methods(tree.value, reading)
    return reading


def _build(tree: dict[str, Any], reading: TuneReading) -> None:
    try:
        reading.plan = TunePlan.model_validate(tree)
        reading.plan._text = reading.text
    except ValidationError as error:
        for details in error.errors():
            _tell(details, reading)
        return
    training = reading.plan.training
    if training.epochs is not None and training.steps is not None:
        reading.add(("training", "steps"), "steps and epochs both set the length; keep one")
    if reading.plan.data.validation is None:
        for word in ("evaluate_every", "early_stop"):
            if getattr(training, word) is not None:
                message = f"{word} has no effect without `data: {{validation: ...}}`"
                reading.add(("training", word), message, key=True)


def _tell(details: ErrorDetails, reading: TuneReading) -> None:
    """Put one of pydantic's errors in our words, at its place."""
    path, kind = tuple(details["loc"]), details["type"]
    key = str(path[-1])
    if kind == "plan":
        context = details.get("ctx", {})
        reading.add((*path, *context.get("at", ())), str(context["message"]))
    elif kind == "extra_forbidden":
        valid = list(_words_at(path[:-1]))
        hint = did_you_mean(key, valid)
        reading.add(path, f"unknown key '{key}'{hint} (valid: {', '.join(valid)})", key=True)
    elif kind == "missing":
        reading.add(path[:-1], f"missing key '{key}': {_EXAMPLES.get(key, f'write `{key}:`')}")
    elif kind == "model_type":
        reading.add(path, f"{key} is a mapping of keys to values; got {shown(details['input'])}")
    else:
        reading.add(path, f"{key} must be {accepted(details)}; got {shown(details['input'])}")


_EXAMPLES = {
    "base": "the model to tune: `base: ./model`",
    "data": "what to learn from: `data: {train: rows.jsonl}`",
    "train": "write `train: rows.jsonl`",
    "tuner": "what trains: `tuner: full`, `tuner: lora` or another of `mergekit-ft methods`",
}


def _words_at(path: Keys) -> Iterator[str]:
    kind: type[BaseModel] = TunePlan
    for step in path:
        kind = cast(type[BaseModel], kind.model_fields[str(step)].annotation)
    yield from kind.model_fields


def _methods(tree: dict[str, Any], reading: TuneReading) -> None:
    """Make the tuner and the objective; what is wrong with their parameters is told as well."""
    for word in ("tuner", "objective"):
        given = tree.get(word, "sft" if word == "objective" else None)
        try:
            step = _method(given)
        except Exception:  # told by _build
            continue
        setattr(reading, word, _made(step, word, reading))
    plan, tuner = reading.plan, reading.tuner
    if plan is not None and tuner is not None and plan.output not in (None, *tuner.gives):
        message = f"{plan.tuner.method} gives {' or '.join(tuner.gives)}, not {plan.output}"
        reading.add(("output",), message)


def _made(step: Step, word: str, reading: TuneReading) -> Any:
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
