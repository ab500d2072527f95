"""What is measured, on which rows, and how sure a figure is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.evaluation.tasks import Task
from mergekit_ft.registry import did_you_mean

_SCORED = ("completion", "messages", "text")  # shapes of rows whose tokens are scored
_SPOKEN = ("completion", "messages")  # of which an answer is decoded
_CHOICES = ("choices", "pair")  # of which one of several answers is chosen


@dataclass(frozen=True)
class Measure:
    """One figure of a task."""

    shapes: tuple[str, ...]  # of the rows that allow it
    meaning: str
    unit: str = "%"  # "%" is of shares
    lower: bool = False  # is better


MEASURES = {
    "loss": Measure(
        _SCORED, "negative log-likelihood of the scored tokens, nats a token", "nats", lower=True
    ),
    "perplexity": Measure(_SCORED, "exp(loss)", "", lower=True),
    "token_accuracy": Measure(
        _SCORED,
        "share of scored tokens that are the likeliest after the true ones (teacher-forced)",
    ),
    "exact_match": Measure(_SPOKEN, "share of greedy answers equal to the row's, outer blanks off"),
    "exact_match_normalised": Measure(
        _SPOKEN, "the same, case, punctuation, articles and blanks apart (as SQuAD)"
    ),
    "choice_accuracy": Measure(
        _CHOICES, "share of rows whose right choice has the largest log-probability"
    ),
    "choice_accuracy_per_token": Measure(
        _CHOICES, "share of rows whose right choice has the largest log-probability a token"
    ),
}


@dataclass(frozen=True)
class Figure:
    """What was measured, and its standard error; None where one row tells nothing of that."""

    value: float
    stderr: float | None

    def report(self) -> dict[str, float | None]:
        """Return it for JSON."""
        return {"value": self.value, "stderr": self.stderr}


def chosen(tasks: Sequence[Task], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the measures of each task: all that its rows allow, or those named.

    PlanError for a name that is none, one that no task's rows allow, and a task without any.
    """
    faults = [
        f"no measure is called {name!r}{did_you_mean(name, MEASURES)} ({', '.join(MEASURES)})"
        for name in names
        if name not in MEASURES
    ]
    asked = [name for name in MEASURES if name in names or not names]
    shapes = {task.shape for task in tasks}
    for name in asked if names else ():
        allowed = MEASURES[name].shapes
        if not shapes & set(allowed):
            told = ", ".join(f"{task.name} ({task.keys})" for task in tasks)
            faults.append(f"{name} needs rows of {' or '.join(allowed)}; these are {told}")
    found = {
        task.name: tuple(name for name in asked if task.shape in MEASURES[name].shapes)
        for task in tasks
    }
    if not faults:
        faults += [
            f"{task.file}: none of {', '.join(names)} can be measured on rows of {task.keys}"
            for task in tasks
            if not found[task.name]
        ]
    if faults:
        raise PlanError("\n".join(faults))
    return found


def mean(values: Iterable[float], weights: Sequence[float]) -> Figure:
    """Return the weighted mean over rows."""
    found = list(values)
    return ratio(found, [1.0] * len(found), weights)


def ratio(above: Sequence[float], below: Sequence[float], weights: Sequence[float]) -> Figure:
    """Return sum(w a) / sum(w b) over rows, and its standard error over rows, linearised.

    stderr^2 = n / (n - 1) sum(w^2 (a - value b)^2) / sum(w b)^2; of a mean sd/sqrt(n).
    """
    total = math.fsum(w * b for w, b in zip(weights, below, strict=True))
    value = math.fsum(w * a for w, a in zip(weights, above, strict=True)) / total
    rows = sum(w > 0 for w in weights)
    if rows < 2:
        return Figure(value, None)
    odds = (w * (a - value * b) for w, a, b in zip(weights, above, below, strict=True))
    spread = math.fsum(odd * odd for odd in odds) * rows / (rows - 1)
    return Figure(value, math.sqrt(spread) / total)


def perplexity(loss: Figure) -> Figure:
    """Return exp(loss); its standard error to first order."""
    if loss.value > 700:
        raise OperatorError(f"a loss of {loss.value:.4g} nats a token has no finite perplexity")
    value = math.exp(loss.value)
    return Figure(value, None if loss.stderr is None else value * loss.stderr)
