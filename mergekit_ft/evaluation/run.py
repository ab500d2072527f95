"""evaluate(): models and files of rows -> figures, one model in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mergekit_ft.errors import MergekitError, PlanError, SourceError
from mergekit_ft.evaluation.asking import CHOSEN, FORCED, SPOKEN, Asking, rows_of
from mergekit_ft.evaluation.chain import Kept, kept, require_chain
from mergekit_ft.evaluation.findings import Asked, Evaluation, Result
from mergekit_ft.evaluation.harness import ask_harness, require_harness
from mergekit_ft.evaluation.measures import MEASURES, chosen
from mergekit_ft.evaluation.tasks import Data, Task, read_tasks
from mergekit_ft.models.opening import around, merged_tokenizer, open_merge, open_speaker
from mergekit_ft.models.speaker import Speaker
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.plan import ModelReference
from mergekit_ft.resolution.opening import reference_of

Opener = Callable[[], Speaker]
Model = str | ModelReference | Speaker | Opener
Models = str | Mapping[str, Model] | Sequence[Model]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLANS = (".yaml", ".yml")  # what ends so is a merge plan
ROWS = ("auto", "raw", "chat")


def evaluate(
    models: Models,
    data: Data = (),
    *,
    measures: Sequence[str] = (),
    rows: str = "auto",
    limit: int | None = None,
    batch: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    chain: bool = False,
    harness: Sequence[str] = (),
    answers: bool = False,
    precision: str = "float32",
    device: str = "cpu",
    offline: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure models on the rows of files; `progress` hears of rows, `answers` keeps them.

    A model is a plan's reference (or its words), a merge plan's file, a speaker, or what opens one
    when its turn has come; named by itself, or by the key of a mapping. Raises `MergekitError`.
    """
    named = _named(models)
    asked = Asked(rows, batch, max_length, max_new_tokens, tuple(stop))
    tasks = read_tasks(data, limit)
    wanted = chosen(tasks, measures)
    _refuse_idle(asked, tasks, wanted, harness)
    if answers and not {name for names in wanted.values() for name in names} & {*SPOKEN, *CHOSEN}:
        raise PlanError("answers: nothing is answered or chosen by what is measured")
    if chain:
        require_chain(list(named), [task.name for task in tasks])
    if harness:
        require_harness()
    where = Options(device=device).torch_device
    opening = {"offline": offline, "allow_pickle": allow_pickle}
    openers = _openers(named, where, _dtype(precision), opening)
    run = _Run(tasks, wanted, asked, tuple(harness), limit, answers, progress or Unwatched())
    for name, opener in openers.items():
        run.ask(name, opener())
    return run.found(chain)


def _named(models: Models) -> dict[str, Model]:
    found: dict[str, Model] = dict(models) if isinstance(models, Mapping) else {}
    several = [models] if isinstance(models, str) else () if found else models
    for i, model in enumerate(several, start=1):
        told = isinstance(model, str | ModelReference)
        name = str(model) if told else str(getattr(model, "name", f"model {i}"))
        if name in found:
            raise PlanError(f"{name}: is named twice, so its figures could not be told apart")
        found[name] = model
    if not found:
        raise PlanError("no model is named; name one or more")
    return found


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise PlanError(f"precision is {' or '.join(PRECISIONS)}, not {precision!r}")
    return PRECISIONS[precision]


def _refuse_idle(
    asked: Asked,
    tasks: Sequence[Task],
    wanted: Mapping[str, Sequence[str]],
    harness: Sequence[str],
) -> None:
    """Refuse what is out of range, and what would have no effect."""
    if asked.rows not in ROWS:
        raise PlanError(f"rows are {', '.join(ROWS)}, not {asked.rows!r}")
    for name in ("batch", "max_length", "max_new_tokens"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise PlanError(f"{name} {value}: must be 1 or more")
    if any(not text for text in asked.stop):
        raise PlanError("stop: an empty text would end every answer before it begins")
    if not tasks and not harness:
        raise PlanError("no data are named; name JSONL files, or tasks of the harness")
    measured = {name for names in wanted.values() for name in names}
    if (asked.max_new_tokens or asked.stop) and not measured & set(SPOKEN):
        raise PlanError("max_new_tokens and stop are about answers, and none is asked for")
    if asked.max_length and not measured & set(FORCED):
        raise PlanError("max_length cuts what loss is measured on, and none is asked for")
    if asked.rows != "auto" and all(task.shape in ("text", "messages") for task in tasks):
        raise PlanError(f"rows: {asked.rows} is about rows with a prompt, and there are none")


def _openers(
    named: Mapping[str, Model],
    device: torch.device,
    dtype: torch.dtype,
    opening: Mapping[str, Any],
) -> dict[str, Opener]:
    """Return what opens each model; all that are no models are told at once."""
    faults: list[MergekitError] = []
    found: dict[str, Opener] = {}
    for name, model in named.items():
        try:
            found[name] = _opener(model, device, dtype, opening)
        except (PlanError, SourceError) as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise SourceError("\n".join(map(str, faults)))
    return found


def _opener(
    model: Model, device: torch.device, dtype: torch.dtype, opening: Mapping[str, Any]
) -> Opener:
    if isinstance(model, str) and model.endswith(PLANS):
        merged_tokenizer(model, **opening)
        return lambda: open_merge(model, device=device, dtype=dtype, **opening)
    if isinstance(model, str | ModelReference):
        reference = reference_of(model) if isinstance(model, str) else model
        around(reference, **opening)
        return lambda: open_speaker(reference, device=device, dtype=dtype, **opening)
    given: Any = model
    if hasattr(given, "read"):
        return lambda: given
    if callable(given) and not isinstance(given, torch.nn.Module):
        opener: Opener = given
        return opener
    raise PlanError(
        f"{type(model).__name__}: is neither a model's reference nor a speaker (a transformers "
        "model becomes one as ModelSpeaker(model, tokenizer))"
    )


class _Run:
    """An evaluation under way."""

    def __init__(
        self,
        tasks: Sequence[Task],
        wanted: Mapping[str, Sequence[str]],
        asked: Asked,
        harness: tuple[str, ...],
        limit: int | None,
        answers: bool,
        progress: Progress,
    ) -> None:
        self.tasks, self.wanted, self.asked = tuple(tasks), wanted, asked
        self.to_harness, self.limit, self.progress = harness, limit, progress
        self.keeps = answers
        self.models: list[str] = []
        self.results: list[Result] = []
        self.answers: list[Mapping[str, Any]] = []
        self.harness: dict[str, Any] = {}

    def ask(self, name: str, speaker: Speaker) -> None:
        """Ask one model everything."""
        self.models.append(name)
        for task in self.tasks:
            measures = self.wanted[task.name]
            self.progress.start(rows_of(task, measures), f"{name}: {task.name}")
            asking = Asking(speaker, name, task, measures, self.asked, self.progress.advance)
            try:
                with _by(name, task):
                    self.results.append(asking.result())
            finally:
                self.progress.close()
            self.answers += asking.records if self.keeps else []
        if self.to_harness:
            batch = self.asked.batch
            self.harness[name] = ask_harness(speaker, name, self.to_harness, self.limit, batch)

    def found(self, chain: bool) -> Evaluation:
        """Return all that was found."""
        made = Evaluation(
            tuple(self.models),
            self.tasks,
            self.asked,
            tuple(self.results),
            tuple(self.answers),
            harness=self.harness,
        )
        if not chain:
            return made
        return Evaluation(**(vars(made) | {"chain": _chain(made)}))


@contextmanager
def _by(name: str, task: Task) -> Iterator[None]:
    """Tell which model and task met an error that says only what."""
    try:
        yield
    except MergekitError as error:
        if name in str(error) or os.fspath(task.file) in str(error):
            raise
        raise type(error)(f"{name} on {task.name}: {error}") from error


def _chain(made: Evaluation) -> dict[str, Kept]:
    """Return what the models keep as stages, by each measure that every task allows."""
    found: dict[str, Kept] = {}
    for measure in made.measures:
        figures = [
            [made.figure(model, task.name, measure) for task in made.tasks] for model in made.models
        ]
        values = [[f.value for f in row if f is not None] for row in figures]
        if all(len(row) == len(made.tasks) for row in values):
            found[measure] = kept(values, lower=MEASURES[measure].lower)
    if not found:
        raise PlanError("no measure is allowed by the rows of every task, so there is no chain")
    return found
