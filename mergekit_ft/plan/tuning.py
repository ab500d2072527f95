"""What a tune plan may say, key by key, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from mergekit_ft.errors import Fault, PlanError
from mergekit_ft.plan.fields import shown
from mergekit_ft.plan.marks import Keys, Marks
from mergekit_ft.plan.methods import Method, MethodsReading, built, made, words_of
from mergekit_ft.plan.models import Step
from mergekit_ft.plan.references import ModelReference, PlanWords, refuse

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


def _warmup(raw: Any) -> Any:
    fine = isinstance(raw, int | float) and not isinstance(raw, bool) and raw >= 0
    if not fine or (isinstance(raw, float) and raw >= 1):
        refuse(f"warmup is a number of steps (10) or a share of them (0.1); got {shown(raw)}")
    return raw


Files = Annotated[tuple[str, ...], BeforeValidator(_files)]


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
    save_every: Annotated[int, Field(ge=1)] | None = None  # steps, for --resume; None: by cost
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
    _marks: Marks = PrivateAttr(default_factory=Marks)  # where its words stand
    _file: str = PrivateAttr("plan")

    @property
    def text(self) -> str:
        """Return the plan as it was written."""
        return self._text

    def refused(self, path: Keys, message: str) -> PlanError:
        """Return the error that says so of a place in the plan."""
        mark = self._marks.nearest(path)
        return PlanError([Fault(message, self._file, mark.line, mark.column)])


@dataclass
class TuneReading:
    """A tune plan, its methods, and every fault found in it."""

    reading: MethodsReading
    plan: TunePlan | None = None
    tuner: Tuner | None = None
    objective: Objective | None = None

    @property
    def faults(self) -> list[Fault]:
        """Return every fault found."""
        return self.reading.faults

    def accepted(self) -> tuple[TunePlan, Tuner, Objective]:
        """Return the plan and its methods, or raise every fault found."""
        if self.faults or self.plan is None or self.tuner is None or self.objective is None:
            raise PlanError(self.faults or "the plan holds nothing that can be used")
        return self.plan, self.tuner, self.objective


def read_tune(plan: str | os.PathLike[str] | Mapping[str, Any]) -> TuneReading:
    """Return a tune plan given as a file, as YAML text, or as a mapping, and all its faults."""
    reading = words_of(plan)
    found = TuneReading(reading)
    if reading.words is None:
        return found
    found.plan = built(TunePlan, reading, _EXAMPLES)
    if found.plan is not None:
        found.plan._text, found.plan._marks = reading.text, reading.marks
        found.plan._file = reading.file
        _check(found.plan, reading)
    found.tuner, found.objective = made(reading, "tuner"), made(reading, "objective", "sft")
    _check_output(found)
    return found


def _check(plan: TunePlan, reading: MethodsReading) -> None:
    """Add what no word alone is wrong about."""
    training = plan.training
    if training.epochs is not None and training.steps is not None:
        reading.add(("training", "steps"), "steps and epochs both set the length; keep one")
    if plan.data.validation is None:
        for word in ("evaluate_every", "early_stop"):
            if getattr(training, word) is not None:
                message = f"{word} has no effect without `data: {{validation: ...}}`"
                reading.add(("training", word), message, key=True)
    elif training.early_stop is not None and training.evaluate_every is None:
        message = "early_stop counts evaluations: say `evaluate_every:`, the steps between them"
        reading.add(("training", "early_stop"), message, key=True)
    if training.early_stop is not None and training.save_every is not None:
        message = "save_every has no effect: early_stop keeps a checkpoint at every evaluation"
        reading.add(("training", "save_every"), message, key=True)


def _check_output(found: TuneReading) -> None:
    plan, tuner = found.plan, found.tuner
    if plan is not None and tuner is not None and plan.output not in (None, *tuner.gives):
        message = f"{plan.tuner.method} gives {' or '.join(tuner.gives)}, not {plan.output}"
        found.reading.add(("output",), message)


_EXAMPLES = {
    "base": "the model to tune: `base: ./model`",
    "data": "what to learn from: `data: {train: rows.jsonl}`",
    "train": "write `train: rows.jsonl`",
    "tuner": "what trains: `tuner: full`, `tuner: lora` or another of `mergekit-ft methods`",
}
