"""One plan carried out by both toolkits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import mergekit_ft
from tests.peers.families import Family
from tests.peers.peer import Peer, Plan, in_mergekits_words, tensors_of, text_of


@dataclass(frozen=True)
class Merged:
    """One tensor of both results and what went into it."""

    name: str
    ours: Tensor
    theirs: Tensor
    sources: list[Tensor]  # as the plan names them, the base first where there is one


def our_merge(plan: Plan) -> dict[str, Tensor]:
    """Return our merge, not written to disk."""
    with mergekit_ft.open_plan(text_of(plan)) as merged:
        return dict(merged.items())


def their_merge(
    peer: Peer, family: Family, plan: Plan, seed: int | None = None
) -> dict[str, Tensor]:
    """Return the peer's merge of the same plan."""
    options = {} if seed is None else {"random_seed": seed}
    return peer.merge(in_mergekits_words(plan, family.peer_architecture), **options)


def merge_by_both(peer: Peer, family: Family, plan: Plan) -> Iterator[Merged]:
    """Yield every tensor of one plan."""
    yield from pair(plan, our_merge(plan), their_merge(peer, family, plan))


def pair(plan: Plan, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[Merged]:
    """Yield the tensors of two merges; both must hold what every source holds."""
    paths = [plan["base_model"]] if "base_model" in plan else []
    paths += [entry["model"] for entry in plan["models"]]
    sources = [tensors_of(Path(path)) for path in paths]
    assert set(ours) == set(theirs) == set(sources[0])
    for name in ours:
        assert ours[name].shape == theirs[name].shape == sources[0][name].shape
        yield Merged(name, ours[name], theirs[name], [source[name] for source in sources])
