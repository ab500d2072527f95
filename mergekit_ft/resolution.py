"""What a plan asks of these checkpoints: one task for each output tensor, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mergekit_ft.contract import CELL, About, Adjustment, Base, Operator
from mergekit_ft.errors import Fault, PlanError, SourceError
from mergekit_ft.layers import Place, places
from mergekit_ft.plan import ModelReference, Plan, Reading
from mergekit_ft.sources import Source, TensorInfo, open_source
from mergekit_ft.sources.dtypes import BY_NAME, FLOATING, SIZE

NAMED = 5  # tensors named in an error before "and N more"


Then = tuple[Adjustment, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of a source."""

    source: Source
    name: str
    info: TensorInfo


@dataclass(frozen=True)
class Task:
    """One output tensor: where it comes from and what happens to it."""

    name: str
    known: str  # the name that answers for it: the one it is tied to, else its own
    shape: tuple[int, ...]
    dtype: str  # stored, as a safetensors code
    place: Place
    base: Ref | None  # None where the method ignores the base and nothing follows the merge
    tuned: tuple[Ref, ...]  # (k,)
    ids: tuple[str, ...]  # (k,)
    operator: Operator | None = None  # None: not a tensor that merges
    then: Then = ()
    copy: Ref | None = None  # the tensor that comes out as it is
    bits: int = 32  # of the floats that the arithmetic is done in
    first_cell: int = 0  # in the stream of a survey over the whole model

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @cached_property
    def cell(self) -> int:
        """Return the elements of a cell."""
        return self.operator.grain.cell(self.shape) if self.operator is not None else CELL

    @cached_property
    def scratch(self) -> int:
        """Return the rows of scratch that its operators need."""
        operators = [op for op in (self.operator, *self.then) if op is not None]
        return max((op.scratch(len(self.tuned)) for op in operators), default=0)

    @property
    def surveyed(self) -> bool:
        """Say whether a survey over the whole model sees it: tied tensors count once."""
        return self.operator is not None and self.name == self.known

    @property
    def nbytes(self) -> int:
        """Return the bytes written."""
        return self.numel * SIZE[self.dtype]

    @property
    def bytes_read(self) -> int:
        """Return the bytes that one pass over the sources reads."""
        refs = [self.copy] if self.copy is not None else [self.base, *self.tuned]
        return sum(ref.info.nbytes for ref in refs if ref is not None)

    def about(self, spare: int = 2**62) -> About:
        """Return what is known of the tensor unread, for a survey that may keep `spare` bytes."""
        known = (self.ids, self.numel, self.known, self.place, self.bits)
        based = self.base is not None
        return About(*known, spare=spare, shape=self.shape, cell=self.cell, based=based)


@dataclass
class Resolution:
    """A plan whose every word has found its tensors."""

    plan: Plan
    base: Source | None
    donor: Source  # of names, layout, config and side files: the base, else the first model
    members: tuple[Source, ...]  # (k,) the rows of a block, in order
    tasks: list[Task]  # in the order of the donor's files
    unused: dict[str, list[str]] = field(default_factory=dict)  # by model: tensors never read
    notes: list[str] = field(default_factory=list)  # what a user should know and cannot mend here

    @property
    def sources(self) -> list[Source]:
        """Return every source once."""
        everyone = [self.donor, *self.members, *([self.base] if self.base else [])]
        return list({id(source): source for source in everyone}.values())

    @cached_property
    def merged(self) -> list[Task]:
        """Return the tasks that arithmetic is done for."""
        return [task for task in self.tasks if task.operator is not None]

    def close(self) -> None:
        """Let go of every source."""
        for source in self.sources:
            source.close()


def resolve(reading: Reading, **opening: Any) -> Resolution:
    """Open a plan's sources and find every tensor its words mean; all faults in one report."""
    opened = _open_all(reading, opening)
    try:
        return _Resolver(reading, opened).resolution()
    except BaseException:
        for source in opened.values():
            source.close()
        raise


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise all faults as one error: of the sources where only they are at fault."""
    if faults:
        report = PlanError(faults)
        if all(fault.kind == "source" for fault in faults):
            raise SourceError(str(report))
        raise report


Key = tuple[str, str | None]


def _open_all(reading: Reading, opening: Mapping[str, Any]) -> dict[Key, Source]:
    """Open each model that the plan names, once; what cannot be opened is a fault."""
    opened: dict[Key, Source] = {}
    for path, model in _named_models(reading.plan):
        if model.key not in opened:
            try:
                opened[model.key] = open_source(model.path, model.revision, **opening)
            except SourceError as error:
                reading.add(path, str(error), kind="source")
    return opened


def _named_models(plan: Plan | None) -> Iterable[tuple[tuple[str | int, ...], ModelReference]]:
    if plan is None:
        return
    if plan.base_model is not None:
        yield ("base_model",), plan.base_model
    for i, entry in enumerate(plan.models):
        yield ("models", i, "model"), entry.model


class _Resolver:
    """Finds the task of every tensor of the donor, and every fault on the way."""

    def __init__(self, reading: Reading, opened: dict[Key, Source]) -> None:
        self.reading, self.opened = reading, opened
        named = [model for _, model in _named_models(reading.plan)]
        if reading.plan is None or not named or any(m.key not in opened for m in named):
            raise_faults(reading.faults or [Fault("the plan names no model", reading.file)])
        assert reading.plan is not None
        self.plan: Plan = reading.plan
        self.donor = opened[named[0].key]
        self.base = opened[self.plan.base_model.key] if self.plan.base_model else None
        self.places = places(self.donor)
        self.same: Any = None  # what an operator's survey over the whole model holds fixed

    def resolution(self) -> Resolution:
        """Return the tasks, or raise every fault."""
        lookup = self.reading.lookup
        members = lookup.members() if lookup is not None else []
        self.ids = tuple(str(model) for model in members)
        self.members = tuple(self.opened[model.key] for model in members)
        self._require_every_tensor()
        tasks = self._number_cells(self._tasks()) if lookup is not None else []
        if lookup is not None:
            self.reading.take(lookup.unused())
        raise_faults(self.reading.faults)
        found = Resolution(self.plan, self.base, self.donor, self.members, tasks)
        found.unused = self._unused(found)
        found.notes = [*self.reading.told(), *self._notes(found)]
        return found

    def _tasks(self) -> list[Task]:
        """Return a task for each tensor that every member has in the donor's shape."""
        return [
            self._task(info)
            for file in self.donor.files
            for info in file.tensors
            if self._fits(info)
        ]

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
        for path, model in _named_models(self.plan):
            source = self.opened[model.key]
            missing = [name for name in self.donor if source.locate(name) is None]
            if missing:
                self.reading.add(
                    path,
                    f"{model} lacks {_named(missing)} of {self.donor.reference}; every model must "
                    "have all tensors of the base (of the first model where there is no base)",
                    kind="source",
                )
            for name in self.donor:
                self._require_same_kind(path, source, self.donor[name])

    def _require_same_kind(self, path: Any, source: Source, info: TensorInfo) -> None:
        name = source.locate(info.name)
        if name is None:
            return
        other = source[name]
        if other.shape != info.shape:
            problem = f"shape {list(other.shape)}, not {list(info.shape)}"
        elif (other.dtype in FLOATING) != (info.dtype in FLOATING):
            problem = f"dtype {other.dtype}, not {info.dtype}"
        else:
            return
        self.reading.add(
            path,
            f"{source.reference}: {name} has {problem} as in {self.donor.reference}; "
            "only tensors of one shape and kind merge",
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

    def _unused(self, found: Resolution) -> dict[str, list[str]]:
        """Return, by model, the tensors that no task reads."""
        read: dict[int, set[str]] = {id(source): set() for source in found.sources}
        for task in found.tasks:
            for ref in (task.base, task.copy, *task.tuned):
                if ref is not None:
                    read[id(ref.source)].add(ref.name)
        rest = {s.reference: [name for name in s if name not in read[id(s)]] for s in found.sources}
        return {reference: names for reference, names in rest.items() if names}

    def _notes(self, found: Resolution) -> Iterable[str]:
        for reference, names in found.unused.items():
            yield f"{reference}: {_named(names)} not in {self.donor.reference}, so not used"
        for source in found.sources:
            other = [n for n in self.donor if self._stored_otherwise(source, self.donor[n])]
            if other:
                first = other[0]
                yield (
                    f"{source.reference}: {_named(other)} stored as {source[first].dtype}, "
                    f"{self.donor[first].dtype} in {self.donor.reference}; the output is "
                    f"{self._stored(self.donor[first])}"
                )

    def _stored_otherwise(self, source: Source, info: TensorInfo) -> bool:
        name = source.locate(info.name)
        return name == info.name and source[name].dtype != info.dtype


def _ref(source: Source, name: str) -> Ref:
    found = source.locate(name)
    assert found is not None
    return Ref(source, found, source[found])


def _named(names: Sequence[str]) -> str:
    """Return a count and the first few names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} ({', '.join(names[:NAMED])}{more})"
