"""What an evaluation found, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_ft.evaluation.findings import Evaluation
from mergekit_ft.evaluation.measures import MEASURES, Figure
from mergekit_ft.evaluation.tasks import Task
from mergekit_ft.inspection.settings import labels
from mergekit_ft.inspection.tables import table


def lines(found: Evaluation) -> Iterator[str]:
    """Yield a table for each task, then the chain, the harness and the notes."""
    names = labels(found.models)
    for task in found.tasks:
        yield from _task(found, task, names)
    if found.chain:
        yield from _chain(found, names)
    for model, tasks in found.harness.items():
        yield f"lm-evaluation-harness: {names[model]}"
        rows = [
            (task, measure, f"{figure.value:.4f}", _pm(figure.stderr, 4))
            for task, figures in tasks.items()
            for measure, figure in figures.items()
        ]
        yield from table(("task", "measure", "value", "standard error"), rows)
        yield ""
    if any(figure.stderr is not None for r in found.results for figure in r.figures.values()):
        yield "\u00b1: one standard error over rows"
    yield from _protocol(found)
    yield from (f"note: {note}" for note in found.notes)


def _task(found: Evaluation, task: Task, names: Mapping[str, str]) -> Iterator[str]:
    results = found.of_task(task.name)
    measures = list(results[0].figures)
    yield f"{task.name}: {len(task.rows)} rows of {task.file} ({task.keys})"
    rows = [
        (names[r.model], *(told(measure, r.figures[measure]) for measure in measures))
        for r in results
    ]
    yield from table(("model", *map(word, measures)), rows)
    yield ""


def word(measure: str) -> str:
    """Return a measure's name for people."""
    return measure.replace("_", " ")


def told(measure: str, figure: Figure) -> str:
    """Return a figure and its standard error, shares in percent."""
    if MEASURES[measure].unit == "%":
        return f"{100 * figure.value:.1f}%{_pm(figure.stderr, 1, 100.0)}"
    places = 4 if abs(figure.value) < 100 else 1
    return f"{figure.value:.{places}f}{_pm(figure.stderr, places)}"


def _pm(stderr: float | None, places: int, scale: float = 1.0) -> str:
    return "" if stderr is None else f" \u00b1{scale * stderr:.{places}f}"


def _chain(found: Evaluation, names: Mapping[str, str]) -> Iterator[str]:
    yield f"chain: {' -> '.join(names[model] for model in found.models)}"
    head = ["measure", "average performance", "backward transfer", "forgetting"]
    before = any(kept.forward is not None for kept in found.chain.values())
    rows = []
    for measure, kept in found.chain.items():
        values: Sequence[float | None] = (kept.average, kept.backward, kept.forgetting)
        values = (*values, kept.forward) if before else values
        rows.append((word(measure), *(_signed(measure, value) for value in values)))
    yield from table((*head, "forward transfer") if before else head, rows)
    yield "  forgetting above 0 is worse, of every measure"
    yield ""


def _signed(measure: str, value: float | None) -> str:
    return "-" if value is None else told(measure, Figure(value, None))


def _protocol(found: Evaluation) -> Iterator[str]:
    """Yield how answers were made, where some were."""
    most = {r.max_new_tokens for r in found.results if r.max_new_tokens is not None}
    if most:
        stop = " or ".join(map(repr, found.asked.stop))
        yield (
            "exact match: greedy answers that end at a token that ends the model's turn"
            f"{f', before {stop}' if stop else ''}, or after "
            f"{' or '.join(map(str, sorted(most)))} tokens; compared as they are, blanks at their "
            "ends apart"
        )
