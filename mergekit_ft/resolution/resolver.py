"""Finds a task for each tensor of the output."""

from __future__ import annotations

from typing import Any

from mergekit_ft.layers import places
from mergekit_ft.plan import Plan, Reading, parts, referred
from mergekit_ft.resolution.conservation import conserved, deeper, own_heads
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.resolution.leftovers import named, notes, unused
from mergekit_ft.resolution.making import Maker, numbered, ref_of
from mergekit_ft.resolution.opening import Opened
from mergekit_ft.resolution.tasks import Ref, Task
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.tokens import row_remedy


class Resolver:
    """Finds the task of every tensor of the donor, and every fault on the way."""

    def __init__(self, reading: Reading, opened: Opened) -> None:
        assert reading.plan is not None
        self.reading, self.opened = reading, opened
        named = [model for _, model in referred(reading.plan)]
        self.plan: Plan = reading.plan
        self.donor = opened[named[0].key]
        part = next(iter(parts(self.plan)), None)
        self.base = opened[part.base.key] if part is not None and part.base is not None else None
        self.places = places(self.donor)
        self.alone: dict[str, list[str]] = {}  # tensors of the donor, and the models that lack them
        self.maker = Maker(reading, self.plan)
        self.maker.know(self.places)

    def resolution(self) -> Resolution:
        """Return the tasks; what cannot be done is a fault of the reading."""
        lookup = self.reading.lookup
        members = lookup.members() if lookup is not None else []
        self.ids = tuple(str(model) for model in members)
        self.members = tuple(self.opened[model.key] for model in members)
        self._require_every_tensor()
        tasks = numbered(self._tasks()) if lookup is not None else []
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
        stored = self.maker.stored(info)
        return Task(info.name, info.name, info.shape, stored, place, None, (), self.ids, copy=own)

    def _task(self, info: TensorInfo) -> Task:
        known = self.donor.ties.get(info.name, info.name)  # a tied tensor is merged as its target
        known = known if known in self.places else info.name
        place = self.places[known]
        tuned = tuple(ref_of(source, info.name) for source in self.members)
        base = ref_of(self.base, info.name) if self.base is not None else None
        first = Ref(self.donor, info.name, info)
        task = Task(
            info.name, known, info.shape, self.maker.stored(info), place, base, tuned, self.ids
        )
        assert self.reading.lookup is not None
        return self.maker.made(task, first, self.reading.lookup)

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
        for path, model in referred(self.plan):
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
