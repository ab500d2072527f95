"""A plan whose every word has found its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit_ft.plan import Plan
from mergekit_ft.resolution.stack import Stack
from mergekit_ft.resolution.tasks import Task
from mergekit_ft.sources import Source


@dataclass
class Resolution:
    """A plan whose every word has found its tensors."""

    plan: Plan
    base: Source | None
    donor: Source  # of names, layout, config and side files: the base, else the first model
    members: tuple[Source, ...]  # (k,) the rows of a block, in order
    tasks: list[Task]  # in the order of the donor's files
    unused: dict[str, list[str]] = field(default_factory=dict)  # by model: tensors never read
    alone: dict[str, list[str]] = field(default_factory=dict)  # tensors of the donor's that are
    # copied, and the models that lack them
    notes: list[str] = field(default_factory=list)  # what a user should know and cannot mend here
    stack: Stack | None = None  # where the output's layers are slices of models
    stages: dict[str, Resolution] = field(default_factory=dict)  # by name: merges that are sources

    @property
    def parts(self) -> dict[str, Resolution]:
        """Return the whole plan by document: this one ("") and the stages."""
        return {"": self, **self.stages}

    @property
    def sources(self) -> list[Source]:
        """Return every source once."""
        everyone = [self.donor, *self.members, *([self.base] if self.base else [])]
        return list({id(source): source for source in everyone}.values())

    @property
    def edits(self) -> Mapping[str, Any]:
        """Return what the output's config.json says otherwise than the donor's, by dotted key."""
        return self.donor.edits if self.stack is None else {**self.donor.edits, **self.stack.edits}

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the models that are merged, as the plan names them, each once."""
        return tuple(dict.fromkeys(model for task in self.tasks for model in task.ids))

    @property
    def leaves(self) -> list[Source]:
        """Return every source that is read from disk, those of the stages too, each once."""
        found = [leaf for source in self.sources for leaf in source.origins or (source,)]
        return list({(str(leaf), *leaf.inputs): leaf for leaf in found}.values())

    @cached_property
    def merged(self) -> list[Task]:
        """Return the tasks that arithmetic is done for."""
        return [task for task in self.tasks if task.operator is not None]

    def close(self) -> None:
        """Let go of every source."""
        for source in self.sources:
            source.close()
