"""Finds a task for each tensor of an output whose layers are stacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ft.contract import Base
from mergekit_ft.layers import Place, places, renumbered, role_of
from mergekit_ft.plan import Reading, referred
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.parameters import Seat
from mergekit_ft.resolution.columns import Column, Slice, Taken
from mergekit_ft.resolution.conservation import BUFFER, own_heads
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.resolution.heights import Heights
from mergekit_ft.resolution.kinds import Kinds
from mergekit_ft.resolution.leftovers import named, notes, untaken, unused
from mergekit_ft.resolution.making import Maker, numbered, ref_of
from mergekit_ft.resolution.modules import columns
from mergekit_ft.resolution.opening import Opened
from mergekit_ft.resolution.stack import Stack
from mergekit_ft.resolution.tasks import Ref, Task
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.tokens import row_remedy


@dataclass(frozen=True)
class Wanted:
    """A tensor of the output, and the names of those that it is made of."""

    name: str
    place: Place
    column: Column
    slice: Slice
    names: Mapping[Keys, str]  # by the path of what is taken
    depth: float | None


class StackedResolver:
    """Finds the task of every tensor of a stack, and every fault on the way."""

    def __init__(self, reading: Reading, opened: Opened) -> None:
        assert reading.plan is not None
        self.reading, self.opened, self.plan = reading, opened, reading.plan
        self.models = [model for _, model in referred(self.plan)]
        self.donor = opened[self.models[0].key]
        self.places = {key: places(source) for key, source in opened.items()}
        self.mine = self.places[self.models[0].key]
        self.heights = Heights(reading, opened, self.places)
        self.columns = columns(reading, self.donor, self.mine, self.heights)
        self.lookups = {lookup.part.path: lookup for lookup in reading.lookups}
        self.alone: dict[str, list[str]] = {}
        self.constants: set[str] = set()  # in layers, which not every model holds
        self.lacking: dict[tuple[Keys, str], list[str]] = {}
        self.maker = Maker(reading, self.plan)

    def resolution(self) -> Resolution:
        """Return the tasks; what cannot be done is a fault of the reading."""
        self._check_heads()
        self._check_bases()
        wanted = list(self._wanted())
        self.maker.know({one.name: one.place for one in wanted})
        tasks = [task for one in wanted for task in self._task(one)] if self.lookups else []
        self._tell_lacking()
        if self.reading.lookup is not None and self.columns:
            self.reading.take(self.reading.lookup.unused())
        stack = Stack(self.columns, self.heights.depths(self.columns, self.donor))
        base = self.opened[self.plan.base_model.key] if self.plan.base_model else None
        found = Resolution(self.plan, base, self.donor, self._members(), numbered(tasks))
        found.stack, found.alone = stack, self.alone
        found.unused = unused(found)
        found.notes = [*notes(found), *untaken(found), *stack.depths.notes]
        return found

    def _members(self) -> tuple[Source, ...]:
        """Return every source that something may be taken of, once."""
        taken = [t for column in self.columns for one in column.slices for t in one.taken]
        keys = dict.fromkeys(t.model.key for t in taken)
        return tuple(self.opened[key] for key in keys)

    def _wanted(self) -> Iterator[Wanted]:
        """Yield the tensors of the output: what comes before the layers, the layers, the rest."""
        rest = []
        for name in self.mine:
            one = self._outside(name)
            if one is not None and one.slice is one.column.slices[0]:
                yield one
            elif one is not None:
                rest.append(one)
        for column in self.columns:
            yield from self._inside(column)
        yield from rest

    def _outside(self, name: str) -> Wanted | None:
        """Return a tensor outside the layers; None for others, or where nothing is taken."""
        known = self.donor.ties.get(name, name)
        known = known if known in self.mine else name
        column = next((c for c in self.columns if known in c.loose), None)
        if column is None or not column.slices:
            return None
        one = column.outside(known)
        place = self.mine[known]
        if place.layer is not None:  # a numbered part of something else than the model's layers
            place = Place(role_of(name))
        return Wanted(name, place, column, one, {t.path: name for t in one.taken}, None)

    def _inside(self, column: Column) -> Iterator[Wanted]:
        """Yield the tensors of a column's layers, as the first source of each slice has them."""
        kinds = Kinds(self.opened, self.places, column)
        for layer, one in column.rows():
            first = one.taken[0]
            for name in kinds.names(first.model.key, one.layer_of(first, layer)):
                yield self._in_layer(name, layer, column, one)
        for path, message in kinds.misfits(self.donor):
            self.reading.add(path, message, kind="source")

    def _in_layer(self, name: str, layer: int, column: Column, one: Slice) -> Wanted:
        own = self.places[one.taken[0].model.key][name]
        names = {t.path: renumbered(name, own, one.layer_of(t, layer)) for t in one.taken}
        place = Place("block", column.stack or "", layer, column.layers)
        return Wanted(renumbered(name, own, layer), place, column, one, names, one.depth(layer))

    def _task(self, wanted: Wanted) -> Iterator[Task]:
        """Yield the task of a tensor that all models have in one shape."""
        outside = wanted.depth is None
        first = self.donor if outside else self.opened[wanted.slice.taken[0].model.key]
        info = first[wanted.name if outside else wanted.names[wanted.slice.taken[0].path]]
        if not self._fits(wanted, info, outside):
            return
        if wanted.name in self.alone or wanted.name in self.constants:
            yield self._copy_of(wanted, Ref(first, info.name, info))
            return
        lookup = self.lookups[wanted.slice.part.path]
        rows = [self._taken(wanted.slice, model.key) for model in lookup.members()]
        tuned = tuple(self._ref(wanted, row) for row in rows)
        base = next((t for t in wanted.slice.taken if t.base), None)
        known = self.donor.ties.get(wanted.name, wanted.name) if outside else wanted.name
        task = Task(
            wanted.name,
            known if known in self.mine or not outside else wanted.name,
            info.shape,
            self.maker.stored(info),
            wanted.place,
            self._ref(wanted, base) if base is not None else None,
            tuned,
            tuple(str(row.model) for row in rows),
        )
        depth = 0.0 if outside else wanted.depth
        template = Ref(first, info.name, info)
        yield self.maker.made(task, template, lookup, self._seats(wanted, rows, task), depth)

    def _copy_of(self, wanted: Wanted, own: Ref) -> Task:
        """Return the task of a tensor that not every model has."""
        name, stored = wanted.name, self.maker.stored(own.info)
        return Task(name, name, own.info.shape, stored, wanted.place, None, (), (), copy=own)

    def _taken(self, one: Slice, key: Any) -> Taken:
        return next(taken for taken in one.taken if taken.model.key == key)

    def _ref(self, wanted: Wanted, taken: Taken) -> Ref:
        return ref_of(self.opened[taken.model.key], wanted.names[taken.path])

    def _seats(self, wanted: Wanted, rows: list[Taken], task: Task) -> list[Seat]:
        """Return the tensors that a task is made of, as entries of their models select them."""
        if wanted.depth is None:
            return []
        names = [wanted.names[row.path] for row in rows]
        return [
            (name, self.places[row.model.key].get(name, task.place))
            for row, name in zip(rows, names, strict=True)
        ]

    def _fits(self, wanted: Wanted, info: TensorInfo, outside: bool) -> bool:
        """Say whether every model has the tensor in one shape; what is not so is a fault."""
        fits = True
        for taken in wanted.slice.taken:
            if taken.model.key in self.reading.unfit:
                return False
            source, name = self.opened[taken.model.key], wanted.names[taken.path]
            found = source.locate(name)
            if found is None:
                fits &= self._lacks(taken, wanted, outside)
            elif not _alike(source[found], info):
                self._differs(taken, source, source[found], info)
                fits = False
        return fits

    def _lacks(self, taken: Taken, wanted: Wanted, outside: bool) -> bool:
        """Note a tensor that a model lacks; say whether another's can stand for it."""
        name = wanted.names[taken.path]
        if outside and name in self.heights.conserved(self.donor, taken.model.key):
            self.alone.setdefault(wanted.name, []).append(str(taken.model))
            return True
        if not outside and BUFFER.fullmatch(name):
            self.constants.add(wanted.name)
            return True
        self.lacking.setdefault((taken.path, str(taken.model)), []).append(name)
        return False

    def _tell_lacking(self) -> None:
        for (path, model), names in self.lacking.items():
            self.reading.add(
                path,
                f"{model} lacks {named(names)} that the first source of the slice has; only layers "
                "of one kind merge",
                kind="source",
            )

    def _differs(self, taken: Taken, source: Source, other: TensorInfo, info: TensorInfo) -> None:
        remedy: str | None = ""
        if other.shape != info.shape:
            remedy = row_remedy(self.plan, info, other)
            if remedy is None:
                return
            problem = f"shape {list(other.shape)}, not {list(info.shape)}"
        else:
            problem = f"dtype {other.dtype}, not {info.dtype}"
        self.reading.add(
            taken.path,
            f"{source.reference}: {other.name} has {problem} as {info.name} of the first source; "
            f"only tensors of one shape and kind merge{remedy}",
            kind="source",
        )

    def _check_bases(self) -> None:
        """Report a base whose layers cannot be told, because it is not among unlike sources."""
        for one in (one for column in self.columns for one in column.slices):
            lookup = self.lookups.get(one.part.path)
            needed = lookup and (lookup.method.base is Base.REQUIRED or self.plan.then)
            if needed and one.part.base is not None and not any(t.base for t in one.taken):
                message = f"{one.part.base} is not among these sources, which take unlike layers, "
                message += "so that the base's layers cannot be told; list it with its layer_range"
                self.reading.add(one.part.path, message, key=True)

    def _check_heads(self) -> None:
        for path, model in referred(self.plan):
            for name in own_heads(self.donor, self.opened[model.key]):
                self.reading.add(
                    path,
                    f"{model} has a {name} of its own, which {self.donor.reference} ties to "
                    f"{self.donor.ties[name]}, so that it would be lost; stack models that all tie "
                    "it, or none (tie_word_embeddings in config.json, and the head in the weights)",
                    kind="source",
                )


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    return one.shape == other.shape and (one.dtype in FLOATING) == (other.dtype in FLOATING)
