"""Which parameters hold where: a table of layers and of what lies outside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from mergekit_ft.inspection.tables import table, value
from mergekit_ft.resolution import Resolution, Task

ROLES = ("embedding", "norm", "head", "other")
ALWAYS = "weight"  # shown for each layer as soon as anything is
Column = tuple[str, str]  # a parameter, and the model it is for ("": all)


@dataclass
class Row:
    """The tensors of one layer, or of one role outside the layers."""

    stack: str
    layer: int | None
    role: str
    tensors: int = 0
    values: dict[Column, dict[str, Any]] = field(default_factory=dict)  # distinct, as they come

    @property
    def label(self) -> str:
        """Return what the first column says."""
        return f"{self.stack}.{self.layer}" if self.layer is not None else self.role

    def add(self, cells: Mapping[Column, Any]) -> None:
        """Add a tensor and its values."""
        self.tensors += 1
        for column, found in cells.items():
            self.values.setdefault(column, {}).setdefault(value(found), found)


def rows(resolution: Resolution) -> list[Row]:
    """Return a row for each layer of each stack, then one for each role."""
    found: dict[tuple[str, int | None, str], Row] = {}
    then = list(_numbered([step.method for step in resolution.plan.then]))
    for task in resolution.merged:
        place = task.place
        key = (place.stack, place.layer, "" if place.layer is not None else place.role)
        found.setdefault(key, Row(*key)).add(_cells(task, then))
    return sorted(found.values(), key=_order(list(found)))


def _order(keys: Sequence[tuple[str, int | None, str]]) -> Any:
    stacks = list(dict.fromkeys(stack for stack, layer, _ in keys if layer is not None))

    def order(row: Row) -> tuple[int, int]:
        if row.layer is None:
            return len(stacks), ROLES.index(row.role)
        return stacks.index(row.stack), row.layer

    return order


def _cells(task: Task, then: Sequence[str]) -> dict[Column, Any]:
    """Return every value that a report shows of one tensor."""
    assert task.operator is not None
    cells = dict(_spread("", task.operator.table(task.known, task.place), task.ids))
    for step, name in zip(task.then, then, strict=True):
        cells |= _spread(f"{name} ", step.table(task.known, task.place), task.ids)
    return cells


def _numbered(names: Sequence[str]) -> Iterator[str]:
    """Tell apart two operators of one name."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if names.count(name) == 1 else f"{name} {seen[name]}"


def _spread(
    prefix: str, shown: Mapping[str, Any], ids: Sequence[str]
) -> Iterator[tuple[Column, Any]]:
    """Give each model's value a column of its own."""
    for word, found in shown.items():
        if isinstance(found, tuple) and len(found) == len(ids):
            yield from (
                ((prefix + word, model), one) for model, one in zip(ids, found, strict=True)
            )
        else:
            yield (prefix + word, ""), found


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return every row with all its values."""
    return [
        {
            "row": row.label,
            "stack": row.stack or None,
            "layer": row.layer,
            "role": row.role or "block",
            "tensors": row.tensors,
            "values": [
                {"parameter": word, "model": model or None, "values": list(distinct.values())}
                for (word, model), distinct in row.values.items()
            ],
        }
        for row in found
    ]


def lines(found: Sequence[Row], ids: Sequence[str]) -> Iterator[str]:
    """Yield what holds everywhere, then a table of what varies."""
    columns = list(dict.fromkeys(column for row in found for column in row.values))
    varying = [column for column in columns if _varies(found, column)]
    shown = [c for c in columns if c in varying or (varying and c[0] == ALWAYS)]
    names = labels(ids)
    for word, pairs in _grouped(c for c in columns if c not in shown):
        said = (_everywhere(found, column, names) for column in pairs)
        yield f"  {word}: {', '.join(said)}"
    if shown:
        head = ("layer", "tensors", *(" ".join(filter(None, (w, names.get(m)))) for w, m in shown))
        body = [(row.label, str(row.tensors), *_texts(row, shown)) for row in found]
        yield from table(head, body)


def labels(ids: Sequence[str]) -> dict[str, str]:
    """Return short names of models: the last part of each path, where those differ."""
    short = {model: PurePath(model).name or model for model in ids}
    return short if len(set(short.values())) == len(short) else {model: model for model in ids}


def _varies(found: Iterable[Row], column: Column) -> bool:
    return len({tuple(row.values.get(column, ())) for row in found}) > 1 or any(
        len(row.values.get(column, ())) > 1 for row in found
    )


def _grouped(columns: Iterable[Column]) -> Iterator[tuple[str, list[Column]]]:
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(column[0], []).append(column)
    yield from groups.items()


def _everywhere(found: Sequence[Row], column: Column, names: Mapping[str, str]) -> str:
    text = next(iter(found[0].values[column]))
    return f"{names[column[1]]} {text}" if column[1] else text


def _texts(row: Row, columns: Iterable[Column]) -> list[str]:
    return [" / ".join(row.values.get(column, {"-": None})) for column in columns]
