"""What is told of a composition: in its file, and to who asked for it."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from mergekit_ft.deltas.members import Composition
from mergekit_ft.deltas.sums import Meeting, Tally
from mergekit_ft.sources import Source
from mergekit_ft.sources.layout import listed


def words(found: Composition, base: Source | None) -> dict[str, Any]:
    """Return what the file says of how it was made."""
    members = [
        {"delta": m.name, "sha256": m.digest, "weight": m.weight, "base": m.delta.words["base"]}
        for m in found.members
    ]
    named = found.members[0].delta.words["base"]
    if base is not None:
        named = {"id": base.reference, "revision": base.revision}
    return {
        "base": named,
        "method": "compose",
        "parameters": {
            "weights": [member.weight for member in found.members],
            "head": found.head.name if found.head else None,
        },
        "density": None,
        "seed": None,
        "provenance": {"members": members, "left_out": dict(sorted(found.left_out.items()))},
    }


def shares(found: Composition, tally: Tally) -> list[dict[str, Any]]:
    """Return of each member how many entries it adds, and its share of their squared norms."""
    apart = math.fsum(tally.energy(member.digest) for member in found.members)
    return [
        {
            "delta": member.name,
            "weight": member.weight,
            "entries": tally.entries.get(member.digest, 0),
            "energy": tally.energy(member.digest) / apart if apart else None,
        }
        for member in found.members
    ]


def meetings(found: Composition, tally: Tally) -> list[dict[str, Any]]:
    """Return of each two members how many entries both change, and how many in opposite ways."""
    told = []
    for one, other in combinations(found.members, 2):
        met = tally.meetings.get((one.digest, other.digest), Meeting())
        names = {"members": [one.name, other.name]}
        told.append({**names, "shared": met.shared, "sign_conflicts": met.conflicts})
    return told


def energy(tally: Tally) -> float | None:
    """Return the squared norm of the sum to the sum of the members' own squared norms."""
    apart = math.fsum(math.fsum(squares) for squares in tally.energies.values())
    return math.fsum(tally.total) / apart if apart else None


def notes(found: Composition) -> list[str]:
    """Return what a user should know and cannot see in the numbers."""
    told = []
    bases = sorted({member.delta.base for member in found.members})
    if len(bases) > 1:
        told.append(
            f"the members name different bases ({', '.join(bases)}); no tensor that two of them "
            "change differs"
        )
    for name, tensors in sorted(found.left_out.items()):
        told.append(f"{name}: {listed(tensors)} left out: whole tensors come from the head alone")
    head = found.head
    if head is not None and head.weight != 1.0:
        told.append(
            f"{head.name}: its whole tensors are taken as they are; the weight {head.weight:g} is "
            "for its entries"
        )
    return told
