"""Gives tasks their operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_ft.contract import Adjustment, Base, Operator
from mergekit_ft.layers import Place
from mergekit_ft.plan import Lookup, Plan, Reading
from mergekit_ft.plan.parameters import Seat
from mergekit_ft.resolution.conservation import BUFFER
from mergekit_ft.resolution.tasks import Ref, Task, Then
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import BY_NAME, FLOATING


class Maker:
    """Finds what is done to each tensor; faults go to the reading."""

    def __init__(self, reading: Reading, plan: Plan) -> None:
        self.reading, self.plan = reading, plan
        self._same: Any = None  # what an operator's survey over the whole model holds fixed
        self._ranked: tuple[str, ...] | None = None  # the models that such a survey sees
        self._model: dict[str, Place] = {}  # the output's parameters
        self._seated: dict[Operator, Operator] = {}

    def know(self, model: Mapping[str, Place]) -> None:
        """Take the tensors of the output, for operators that must know them all."""
        self._model = {name: at for name, at in model.items() if not BUFFER.fullmatch(name)}

    def made(
        self,
        task: Task,
        first: Ref,
        lookup: Lookup,
        inputs: Sequence[Seat] = (),
        depth: float | None = None,
    ) -> Task:
        """Return a task with its operators, or as a copy of `first` where it does not merge."""
        if first.info.dtype not in FLOATING or not task.numel:
            return replace(task, copy=first)
        depth = task.place.depth if depth is None else depth
        operator, then = self._operators(task, lookup, inputs, depth)
        if operator is None:
            return replace(task, copy=first)
        if operator.base is Base.IGNORED and not then:
            task = replace(task, base=None)
        dtypes = {ref.info.dtype for ref in (*task.tuned, first)}
        task = replace(task, operator=operator, then=then, bits=64 if "F64" in dtypes else 32)
        return replace(task, copy=self._copied(task))

    def _copied(self, task: Task) -> Ref | None:
        """Return the tensor that the operators leave as it is, where one does."""
        assert task.operator is not None
        if not all(adjustment.neutral(task.known, task.place) for adjustment in task.then):
            return None
        index = task.operator.copies(len(task.tuned), task.known, task.place)
        if index is None or index >= len(task.tuned):  # with too few models, which is reported
            return None
        return task.base if index < 0 else task.tuned[index]

    def _operators(
        self, task: Task, lookup: Lookup, inputs: Sequence[Seat], depth: float | None
    ) -> tuple[Operator | None, Then]:
        """Return the tensor's operators; None where their parameters are at fault."""
        seat = (task.known, task.place)
        operator = lookup.operator_at(seat, inputs, depth)
        steps = range(len(self.plan.then))
        then = [lookup.for_then(i).operator_at(seat, inputs, depth) for i in steps]
        if operator is None:
            return None, ()
        self._require_same(operator, task)
        if operator not in self._seated:
            self._seated[operator] = operator.seated(self._model)
        return self._seated[operator], tuple(op for op in then if isinstance(op, Adjustment))

    def _require_same(self, operator: Operator, task: Task) -> None:
        """Report what differs between tensors though one survey serves them all."""
        held = operator.same_everywhere()
        self._same = held if self._same is None else self._same
        if held != self._same:
            self.reading.add(
                ("parameters",),
                f"{self.plan.merge_method} ranks the whole model at once, so its density must be "
                f"the same for every tensor; it is {held} for {task.known}, {self._same} before",
            )
        if operator.survey_scope == "model":
            self._ranked = self._ranked or task.ids
            if task.ids != self._ranked:
                self.reading.add(
                    ("merge_method",),
                    f"{self.plan.merge_method} ranks the whole model at once, so every slice must "
                    f"merge the same models in one order: {', '.join(self._ranked)} "
                    f"and {', '.join(task.ids)} are not",
                )

    def stored(self, info: TensorInfo) -> str:
        """Return the dtype that a tensor like this is stored in."""
        wanted = self.plan.stored_dtype
        return BY_NAME[wanted] if wanted and info.dtype in FLOATING else info.kept


def numbered(tasks: Sequence[Task]) -> list[Task]:
    """Give each task its place in the stream that a survey over the whole model sees."""
    first: dict[str, int] = {}
    cell = 0
    for task in tasks:
        if task.surveyed and task.operator and task.operator.survey_scope == "model":
            first[task.known] = cell
            cell += -(-task.numel // task.cell)
    return [replace(task, first_cell=first.get(task.known, 0)) for task in tasks]


def ref_of(source: Source, name: str) -> Ref:
    """Return the tensor of a source that answers for a name."""
    found = source.locate(name)
    assert found is not None
    return Ref(source, found, source[found])
