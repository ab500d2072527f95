"""Finds a task for each tensor of the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergekit_ft.contract import Adjustment, Base, Operator
from mergekit_ft.layers import Place, places
from mergekit_ft.plan import Plan, Reading
from mergekit_ft.resolution.conservation import conserved, deeper, own_heads
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.resolution.leftovers import named, notes, unused
from mergekit_ft.resolution.opening import Opened, named_models
from mergekit_ft.resolution.tasks import Ref, Task, Then
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import BY_NAME, FLOATING
from mergekit_ft.tokens import row_remedy


class Resolver:
    """Finds the task of every tensor of the donor, and every fault on the way."""

    def __init__(self, reading: Reading, opened: Opened) -> None:
        assert reading.plan is not None
        self.reading, self.opened = reading, opened
        named = [model for _, model in named_models(reading.plan)]
        self.plan: Plan = reading.plan
        self.donor = opened[named[0].key]
        self.base = opened[self.plan.base_model.key] if self.plan.base_model else None
        self.places = places(self.donor)
        self.alone: dict[str, list[str]] = {}  # tensors of the donor, and the models that lack them
        self.same: Any = None  # what an operator's survey over the whole model holds fixed

    def resolution(self) -> Resolution:
        """Return the tasks; what cannot be done is a fault of the reading."""
        lookup = self.reading.lookup
        members = lookup.members() if lookup is not None else []
        self.ids = tuple(str(model) for model in members)
        self.members = tuple(self.opened[model.key] for model in members)
        self._require_every_tensor()
        tasks = self._number_cells(self._tasks()) if lookup is not None else []
        if lookup is not None:
            self.reading.take(lookup.unused())
        found = Resolution(self.plan, self.base, self.donor, self.members, tasks)
        found.alone = self.alone
        found.unused = unused(found)
        found.notes = list(notes(found))
        return found

    def _tasks(self) -> list[Task]:
        """Return a task for each tensor that every member has in the donor's shape."""
        return [
            self._copy_of(info) if info.name in self.alone else self._task(info)
            for file in self.donor.files
            for info in file.tensors
            if info.name in self.alone or self._fits(info)
        ]

    def _copy_of(self, info: TensorInfo) -> Task:
        """Return the task of a tensor that the donor alone has."""
        place, own = self.places[info.name], Ref(self.donor, info.name, info)
        stored = self._stored(info)
        return Task(info.name, info.name, info.shape, stored, place, None, (), self.ids, copy=own)

    def _task(self, info: TensorInfo) -> Task:
        known = self.donor.ties.get(info.name, info.name)  # a tied tensor is merged as its target
        known = known if known in self.places else info.name
        place = self.places[known]
        tuned = tuple(_ref(source, info.name) for source in self.members)
        base = _ref(self.base, info.name) if self.base is not None else None
        first = Ref(self.donor, info.name, info)
        task = Task(info.name, known, info.shape, self._stored(info), place, base, tuned, self.ids)
        if info.dtype not in FLOATING or not task.numel:
            return replace(task, copy=first)
        operator, then = self._operators(known, place)
        if operator is None:
            return replace(task, copy=first)
        if operator.base is Base.IGNORED and not then:
            task = replace(task, base=None)
        dtypes = {ref.info.dtype for ref in (*tuned, first)}
        task = replace(task, operator=operator, then=then, bits=64 if "F64" in dtypes else 32)
        return replace(task, copy=self._copied(task))

    def _copied(self, task: Task) -> Ref | None:
        """Return the tensor that the operators leave as it is, where one does."""
        assert task.operator is not None
        if not all(adjustment.neutral(task.known, task.place) for adjustment in task.then):
            return None
        index = task.operator.copies(len(task.tuned), task.known, task.place)
        if index is None:
            return None
        return task.base if index < 0 else task.tuned[index]

    def _operators(self, name: str, place: Place) -> tuple[Operator | None, Then]:
        """Return the tensor's operators; None where their parameters are at fault."""
        lookup = self.reading.lookup
        assert lookup is not None
        operator = lookup.operator(name, place)
        steps = range(len(self.plan.then))
        then = [lookup.for_then(i).operator(name, place) for i in steps]
        if operator is None:
            return None, ()
        held = operator.same_everywhere()
        self.same = held if self.same is None else self.same
        if held != self.same:
            self.reading.add(
                ("parameters",),
                f"{self.plan.merge_method} ranks the whole model at once, so its density must be "
                f"the same for every tensor; it is {held} for {name}, {self.same} before",
            )
        return operator, tuple(op for op in then if isinstance(op, Adjustment))

    def _stored(self, info: TensorInfo) -> str:
        wanted = self.plan.stored_dtype
        return BY_NAME[wanted] if wanted and info.dtype in FLOATING else info.kept

    def _fits(self, info: TensorInfo) -> bool:
        return all(
            (name := source.locate(info.name)) is not None
            and source[name].shape == info.shape
            and (source[name].dtype in FLOATING) == (info.dtype in FLOATING)
            for source in self._everyone()
        )

    def _everyone(self) -> list[Source]:
        everyone = [self.donor, *self.members, *([self.base] if self.base else [])]
        return list({id(source): source for source in everyone}.values())

    def _require_every_tensor(self) -> None:
        for path, model in named_models(self.plan):
            if model.key in self.reading.unfit:
                continue
            source = self.opened[model.key]
            lacked = [name for name in self.donor if source.locate(name) is None]
            alone = conserved(self.donor, source, self.places, lacked)
            for name in (name for name in lacked if name in alone):
                self.alone.setdefault(name, []).append(str(model))
            missing = [name for name in lacked if name not in alone]
            if missing:
                self.reading.add(
                    path,
                    f"{model} lacks {named(missing)} of {self.donor.reference}; every model must "
                    "have all tensors of the base (of the first model where there is no base)",
                    kind="source",
                )
            if (depth := deeper(self.donor, source, self.places)) is not None:
                message = f"{model} has {depth}; models of one depth merge, others by `slices:`"
                self.reading.add(path, message, kind="source")
            for name in own_heads(self.donor, source):
                self.reading.add(
                    path,
                    f"{model} has a {name} of its own, which {self.donor.reference} ties to "
                    f"{self.donor.ties[name]}, so that it would be lost; merge models that all tie "
                    "it, or none (tie_word_embeddings in config.json, and the head in the weights)",
                    kind="source",
                )
            for name in self.donor:
                self._require_same_kind(path, source, self.donor[name])

    def _require_same_kind(self, path: Any, source: Source, info: TensorInfo) -> None:
        name = source.locate(info.name)
        if name is None:
            return
        other = source[name]
        remedy: str | None = ""
        if other.shape != info.shape:
            remedy = row_remedy(self.plan, info, other)
            if remedy is None:
                return
            problem = f"shape {list(other.shape)}, not {list(info.shape)}"
        elif (other.dtype in FLOATING) != (info.dtype in FLOATING):
            problem = f"dtype {other.dtype}, not {info.dtype}"
        else:
            return
        self.reading.add(
            path,
            f"{source.reference}: {name} has {problem} as in {self.donor.reference}; "
            f"only tensors of one shape and kind merge{remedy}",
            kind="source",
        )

    def _number_cells(self, tasks: list[Task]) -> list[Task]:
        """Give each task its place in the stream that a survey over the whole model sees."""
        first: dict[str, int] = {}
        cell = 0
        for task in tasks:
            if task.surveyed and task.operator and task.operator.survey_scope == "model":
                first[task.known] = cell
                cell += -(-task.numel // task.cell)
        return [replace(task, first_cell=first.get(task.known, 0)) for task in tasks]


def _ref(source: Source, name: str) -> Ref:
    found = source.locate(name)
    assert found is not None
    return Ref(source, found, source[found])
