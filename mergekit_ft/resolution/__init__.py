"""What a plan asks of these checkpoints: one task for each output tensor, from headers alone."""

from __future__ import annotations

from typing import Any

from mergekit_ft.plan import Reading
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.resolution.opening import opened, raise_faults
from mergekit_ft.resolution.resolver import Resolver
from mergekit_ft.resolution.tasks import Ref, Task, Then
from mergekit_ft.resolution.views import viewed

__all__ = ["Ref", "Resolution", "Task", "Then", "raise_faults", "resolve"]


def resolve(reading: Reading, **opening: Any) -> Resolution:
    """Open a plan's sources and find every tensor its words mean; all faults in one report."""
    sources = opened(reading, opening)
    held = list(sources.values())
    try:
        sources = viewed(reading, sources)
        return Resolver(reading, sources).resolution()
    except BaseException:
        for source in {id(source): source for source in [*held, *sources.values()]}.values():
            source.close()
        raise
