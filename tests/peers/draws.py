"""One random plan under many seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.peers.both import our_merge, their_merge
from tests.peers.families import Family
from tests.peers.peer import Peer, Plan, tensors_of

DRAWS = 60


class Draws:
    """The deltas of one plan under many seeds, by both toolkits; each is (draws, elements)."""

    def __init__(self, peer: Peer, family: Family, plan: Plan, **ours_alone: str) -> None:
        self.base = tensors_of(Path(family.base))
        # In a small tensor, the factor that restores the norm varies much from draw to draw.
        self.names = [name for name in sorted(self.base) if self.base[name].numel() >= 256]

        def seeded(seed: int) -> Plan:
            return {**plan, "parameters": {**plan["parameters"], **ours_alone, "seed": seed}}

        self.ours = torch.stack([self.row(our_merge(seeded(i))) for i in range(DRAWS)])
        theirs = (their_merge(peer, family, plan, seed=i) for i in range(DRAWS))
        self.theirs = torch.stack([self.row(merged) for merged in theirs])

    def delta(self, path: str) -> Tensor:
        """Return (elements,) the whole delta of a model."""
        return self.row(tensors_of(Path(path)))

    def row(self, merged: dict[str, Tensor]) -> Tensor:
        """Return (elements,) what a merge, or a model, adds to the base."""
        return torch.cat([(merged[n].double() - self.base[n]).flatten() for n in self.names])
