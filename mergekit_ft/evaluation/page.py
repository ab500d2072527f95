"""What an evaluation found, as a page: a map of models and tasks, tables."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_ft.evaluation.findings import Evaluation
from mergekit_ft.evaluation.measures import MEASURES
from mergekit_ft.evaluation.saying import word
from mergekit_ft.inspection.settings import labels
from mergekit_ft.reports import Column, HeatMap, Measure, Notes, Part, Report, Table


def report(found: Evaluation) -> Report:
    """Return the page of what was found."""
    facts = [("model", model) for model in found.models]
    facts += [(f"task {t.name}", f"{len(t.rows)} rows of {t.file}") for t in found.tasks]
    return Report("Evaluation", tuple(facts), tuple(_summary(found)), tuple(_parts(found)))


def heat_map(found: Evaluation) -> HeatMap | None:
    """Return the map of models and tasks; None where no task was asked."""
    if not found.tasks:
        return None
    names = labels(found.models)
    measures = [
        Measure(
            word(name),
            [[_value(found, model, task.name, name) for task in found.tasks]
             for model in found.models],
            f"{MEASURES[name].meaning}.",
            MEASURES[name].unit if MEASURES[name].unit == "%" else "",
        )
        for name in found.measures
    ]  # fmt: skip
    return HeatMap(
        "Models and tasks",
        [names[model] for model in found.models],
        [task.name for task in found.tasks],
        measures,
        row_axis="model",
        column_axis="task",
        written=True,
        missing="not measured on such rows",
    )


def _value(found: Evaluation, model: str, task: str, measure: str) -> float | None:
    figure = found.figure(model, task, measure)
    return None if figure is None else figure.value


def _summary(found: Evaluation) -> Iterator[str]:
    for name, kept in found.chain.items():
        yield (
            f"{word(name).capitalize()} over the chain: average {kept.average:.4g}, backward "
            f"transfer {kept.backward:.4g}, forgetting {kept.forgetting:.4g}."
        )


def _parts(found: Evaluation) -> Iterator[Part]:
    mapped = heat_map(found)
    if mapped is not None:
        yield mapped
        yield _figures(found)
    if found.harness:
        yield _harness(found)
    if found.notes:
        yield Notes("Notes", found.notes)


def _figures(found: Evaluation) -> Table:
    columns = (
        Column("task"),
        Column("model"),
        Column("measure"),
        Column("value", number=True),
        Column("standard error", number=True, meaning="over rows"),
    )
    rows = [
        (r.task, r.model, word(name), figure.value, figure.stderr)
        for task in found.tasks
        for r in found.of_task(task.name)
        for name, figure in r.figures.items()
    ]
    return Table("Figures", columns, rows)


def _harness(found: Evaluation) -> Table:
    columns = (
        Column("model"),
        Column("task"),
        Column("measure"),
        Column("value", number=True),
        Column("standard error", number=True),
    )
    rows = [
        (model, task, name, figure.value, figure.stderr)
        for model, tasks in found.harness.items()
        for task, figures in tasks.items()
        for name, figure in figures.items()
    ]
    return Table("lm-evaluation-harness", columns, rows)
