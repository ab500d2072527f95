"""What a plan asks of these checkpoints: one task for each output tensor, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergekit_ft.errors import Fault
from mergekit_ft.plan import Reading
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.resolution.opening import Find, Opener, raise_faults
from mergekit_ft.resolution.resolver import Resolver
from mergekit_ft.resolution.stacked import StackedResolver
from mergekit_ft.resolution.tasks import Ref, Task, Then
from mergekit_ft.resolution.views import viewed
from mergekit_ft.sources import Source
from mergekit_ft.tokens import check_template

__all__ = ["Ref", "Resolution", "Task", "Then", "raise_faults", "resolve"]

Computed = Callable[[str, Resolution], Source]  # a stage's name and its merge -> a source


def resolve(
    reading: Reading, computed: Computed, *, find: Find | None = None, **opening: Any
) -> Resolution:
    """Open a plan's sources and find every tensor its words mean; all faults in one report."""
    documents = _Documents(computed, find, opening)
    try:
        found = documents.resolved(reading)
        raise_faults(reading.faults)
        if found is None:
            raise_faults([Fault("the plan names no model", reading.file)])
        assert found is not None
        found.stages = documents.stages
        found.notes = [*reading.told(), *found.notes, *_of_stages(found)]
        return found
    except BaseException:
        documents.close()
        raise


def _of_stages(found: Resolution) -> Iterator[str]:
    """Yield the notes of stages, and name what one says without effect."""
    kept = {part.donor.reference for part in found.parts.values() if not part.plan.stored_dtype}
    for name, stage in found.stages.items():
        yield from (f"{name}: {note}" for note in stage.notes)
        if stage.plan.stored_dtype and name not in kept:
            yield (
                f"{name}: its dtype decides nothing: stages are computed in float32, and the "
                "output is stored in the dtype of the plan or of its donor"
            )


def _resolver(reading: Reading) -> type[Resolver] | type[StackedResolver]:
    """Return who finds the tasks: of whole models, or of a stack."""
    plan = reading.plan
    assert plan is not None
    return StackedResolver if plan.slices or plan.modules else Resolver


class _Documents:
    """Resolves a plan's documents, each once, the stages before those that use them."""

    def __init__(self, computed: Computed, find: Find | None, opening: Mapping[str, Any]) -> None:
        self._computed, self._opener = computed, Opener(find, opening)
        self._stages: dict[str, Source | None] = {}
        self.stages: dict[str, Resolution] = {}
        self._views: list[Source] = []

    def resolved(self, reading: Reading) -> Resolution | None:
        """Return what a document asks for; None where a source is missing. Faults are noted."""
        sources = self._opener.opened(reading, self._stage)
        if sources is None:
            check_template(reading)
            return None
        sources = viewed(reading, sources)
        self._views += sources.values()
        return _resolver(reading)(reading, sources).resolution()

    def _stage(self, reading: Reading, name: str) -> Source | None:
        if name not in self._stages:
            self._stages[name] = None  # where stages go in a circle, which is a fault by now
            before = len(reading.faults)
            found = self.resolved(reading.stages[name])
            if found is not None and len(reading.faults) == before:
                self.stages[name] = found
                self._stages[name] = self._computed(name, found)
        return self._stages[name]

    def close(self) -> None:
        """Let go of everything that was opened."""
        for source in (*self._opener.sources.values(), *self._views):
            source.close()
