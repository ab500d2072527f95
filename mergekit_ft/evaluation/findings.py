"""What an evaluation found: figures of each model on each task, answers, and what to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ft.evaluation.chain import Kept
from mergekit_ft.evaluation.measures import MEASURES, Figure
from mergekit_ft.evaluation.tasks import Task


@dataclass(frozen=True)
class Asked:
    """How rows become tokens and answers; what no figure should depend on is `batch`."""

    rows: str = "auto"  # auto, raw, chat: as in a tune plan
    batch: int = 16  # rows at a time, at most
    max_length: int | None = None  # tokens; of longer rows the rest is not scored
    max_new_tokens: int | None = None  # of an answer; None: as many as the longest one needs
    stop: tuple[str, ...] = ()  # texts that end an answer


@dataclass(frozen=True)
class Result:
    """One model on one task."""

    model: str
    task: str
    rendered: str  # how prompts were written: chat, raw
    figures: Mapping[str, Figure]
    scored_tokens: int | None = None
    max_new_tokens: int | None = None  # that an answer could have
    unended: int = 0  # answers that were cut there
    cut: int = 0  # rows that were longer than max_length

    def report(self) -> dict[str, Any]:
        """Return it for JSON; what does not apply is left out."""
        facts: dict[str, Any] = {"model": self.model, "task": self.task, "rows_as": self.rendered}
        if self.scored_tokens is not None:
            facts["scored_tokens"] = self.scored_tokens
            facts["rows_cut"] = self.cut
        if self.max_new_tokens is not None:
            facts["max_new_tokens"] = self.max_new_tokens
            facts["answers_cut"] = self.unended
        return facts | {"measures": {name: f.report() for name, f in self.figures.items()}}


@dataclass(frozen=True)
class Evaluation:
    """All that was found."""

    models: tuple[str, ...]
    tasks: tuple[Task, ...]
    asked: Asked
    results: tuple[Result, ...]  # model by model
    answers: tuple[Mapping[str, Any], ...] = ()  # each prompt, answer and verdict
    chain: Mapping[str, Kept] = field(default_factory=dict)  # by the measure
    harness: Mapping[str, Mapping[str, Mapping[str, Figure]]] = field(default_factory=dict)

    def figure(self, model: str, task: str, measure: str) -> Figure | None:
        """Return a figure; None where the task's rows do not allow that measure."""
        return next(
            r.figures.get(measure) for r in self.results if (r.model, r.task) == (model, task)
        )

    @property
    def measures(self) -> tuple[str, ...]:
        """Return what was measured, on any task."""
        return tuple(name for name in MEASURES if any(name in r.figures for r in self.results))

    def of_task(self, task: str) -> list[Result]:
        """Return what was found of one task, model by model."""
        return [result for result in self.results if result.task == task]

    @property
    def notes(self) -> list[str]:
        """Return what who reads the figures must know."""
        return [note for task in self.tasks for note in _notes(task, self.of_task(task.name))]

    def report(self) -> dict[str, Any]:
        """Return it for JSON, answers apart."""
        found: dict[str, Any] = {
            "models": list(self.models),
            "tasks": [
                {"name": t.name, "file": t.file, "keys": t.keys, "rows": len(t.rows), "of": t.of}
                for t in self.tasks
            ],
            "stop": list(self.asked.stop),
            "results": [result.report() for result in self.results],
        }
        if self.chain:
            found["chain"] = {name: kept.report() for name, kept in self.chain.items()}
        if self.harness:
            found["harness"] = {
                model: {
                    task: {name: figure.report() for name, figure in figures.items()}
                    for task, figures in tasks.items()
                }
                for model, tasks in self.harness.items()
            }
        return found | {"notes": self.notes}


def _notes(task: Task, results: Sequence[Result]) -> Iterator[str]:
    if len(task.rows) < task.of:
        yield f"{task.name}: the first {len(task.rows)} of {task.of} rows alone"
    for r in results:
        if r.cut:
            yield f"{task.name}, {r.model}: {r.cut} rows were cut at max_length"
        if r.unended:
            yield (
                f"{task.name}, {r.model}: {r.unended} of {len(task.rows)} answers had not ended "
                f"after {r.max_new_tokens} tokens"
            )
    if len({r.rendered for r in results}) > 1:
        told = ", ".join(f"{r.model} {r.rendered}" for r in results)
        yield f"{task.name}: prompts were not written alike ({told}); --rows raw makes them so"
    tokens = {r.scored_tokens for r in results}
    if len(tokens) > 1:
        yield (
            f"{task.name}: the models cut the rows into different numbers of tokens "
            f"({', '.join(f'{r.model} {r.scored_tokens}' for r in results)}), so what is measured "
            "a token does not compare"
        )
