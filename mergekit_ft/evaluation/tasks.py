"""Files of rows -> tasks: what a model is asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_ft.data.rows import CHOICES, SHAPES, Row, read_rows
from mergekit_ft.errors import PlanError, SourceError

PathLike = str | os.PathLike[str]
Data = Mapping[str, PathLike] | Sequence[PathLike]


@dataclass(frozen=True)
class Task:
    """The rows of one file."""

    name: str
    file: str
    rows: tuple[Row, ...]  # all of one shape
    of: int  # rows that the file has

    @property
    def shape(self) -> str:
        """Return what its rows are."""
        return self.rows[0].shape

    @property
    def keys(self) -> str:
        """Return the keys that a row has, to be told."""
        return " + ".join((SHAPES | CHOICES)[self.shape])


def read_tasks(data: Data, limit: int | None) -> list[Task]:
    """Return a task for each file, named by its stem unless `data` names it; first rows alone."""
    if limit is not None and limit < 1:
        raise PlanError(f"limit {limit}: at least one row is asked")
    tasks: list[Task] = []
    faults: list[str] = []
    for name, file in _named(data).items():
        try:
            rows = read_rows([file], SHAPES | CHOICES)
            tasks.append(Task(name, os.fspath(file), tuple(rows[:limit]), len(rows)))
        except SourceError as error:
            faults.append(str(error))
    for task in tasks:
        if not any(row.weight for row in task.rows):
            faults.append(f"{task.file}: every row has weight 0, so there is nothing to measure")
    if faults:
        raise SourceError("\n".join(faults))
    return tasks


def _named(data: Data) -> dict[str, PathLike]:
    if isinstance(data, str | os.PathLike):
        data = [data]
    if isinstance(data, Mapping):
        return dict(data)
    found: dict[str, PathLike] = {}
    for file in data:
        name = Path(file).stem
        if name in found:
            raise PlanError(
                f"{found[name]} and {file} would both be the task {name!r}: name one of them "
                "(--task NAME=FILE)"
            )
        found[name] = file
    return found
