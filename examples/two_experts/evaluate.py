"""Measure checkpoints on both tasks' held-out items and on neutral text: `mergekit-ft eval`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.two_experts.items import NEUTRAL, TASKS, neutral_rows, rows_of
from mergekit_ft.evaluation import evaluate as measure

MEASURES = ("loss", "exact_match")


@dataclass(frozen=True)
class Score:
    """Hold what was measured on a task."""

    loss: float  # nats a scored token
    exact: float  # share of items whose greedy answer is the right one

    def beats(self, other: "Score") -> bool:
        """Say whether both figures are better."""
        return self.loss < other.loss and self.exact > other.exact


@dataclass(frozen=True)
class Scores:
    """Hold all figures of one checkpoint."""

    tasks: dict[str, Score]
    neutral_loss: float  # nats a token


def evaluate(
    checkpoints: Mapping[str, Path], folder: Path, limit: int | None, say: Callable[[str], None]
) -> dict[str, Scores]:
    """Measure checkpoints on rows written to `folder`, or on the first `limit` of each kind."""
    files = write_rows(folder)
    names = [word for measure in MEASURES for word in ("--measure", measure)]
    words = [*map(str, checkpoints.values()), *map(str, files.values()), "--rows raw", *names]
    say(f"mergekit-ft eval {' '.join(words)}")
    models: Any = {name: str(path) for name, path in checkpoints.items()}
    found = measure(models, files, measures=MEASURES, rows="raw", limit=limit)

    def figure(name: str, task: str, measured: str) -> float:
        return next(r for r in found.of_task(task) if r.model == name).figures[measured].value

    return {
        name: Scores(
            {task: Score(*(figure(name, task, word) for word in MEASURES)) for task in TASKS},
            figure(name, NEUTRAL, "loss"),
        )
        for name in checkpoints
    }


def write_rows(folder: Path) -> dict[str, Path]:
    """Write the held-out items and the neutral text as rows."""
    texts = {task: rows_of(task, "heldout") for task in TASKS} | {NEUTRAL: neutral_rows()}
    files = {name: folder / f"{name}.jsonl" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text, encoding="utf-8")
    return files
