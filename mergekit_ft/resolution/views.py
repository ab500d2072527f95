"""Models as their plan wants them seen: other sources in place of those that were opened."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_ft.plan import Reading
from mergekit_ft.resolution.naming import renamed
from mergekit_ft.resolution.opening import Opened
from mergekit_ft.tokens import by_token

# A view is given every source by its model's key and returns those to use instead. What it cannot
# do is a fault added to the reading; it returns that source as it was, so that all faults of a
# plan are found at once.
View = Callable[[Reading, Opened], Opened]

VIEWS: tuple[View, ...] = (
    renamed,
    by_token,
)  # in order: names and layout, then embeddings by token


def viewed(reading: Reading, sources: Opened) -> Opened:
    """Return the sources to use, each model under its own key."""
    for view in VIEWS:
        sources = view(reading, sources)
    return sources
