"""Sensitivity of modules along a training (FPF, Zhao et al. 2023, arXiv:2304.04158, section 3).

Between each two neighbours theta_n-1, theta_n of a chain of checkpoints, tensor by tensor:

    mean       (1 / |theta|) |theta_n - theta_n-1|_1
    relative   |theta_n - theta_n-1|_2 / |theta_n-1|_2

and the same over each family: tensors of one name, the number of the layer left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ft.layers import Place
from mergekit_ft.looking import Finding, Probe, Seen


class Sensitivity(Probe):
    """Rank modules by how far they move."""

    takes: ClassVar[tuple[int, int | None]] = (2, None)
    columns: ClassVar[tuple[str, ...]] = ("mean", "relative")
    unit: ClassVar[str] = "mean |delta|"

    top: int = Field(5, ge=1, description="families that `--write` lists, the most sensitive first")
    by: str = Field(
        "mean", pattern="^(mean|relative)$", description="what ranks: mean (the paper) or relative"
    )

    def reduce(self, rows: Tensor) -> Tensor:
        """Return, for each two neighbours, the sums of |delta|, delta^2 and the first's square."""
        steps = rows[1:] - rows[:-1]
        return torch.stack(
            [steps.abs().sum(1), steps.square().sum(1), rows[:-1].square().sum(1)], 1
        ).flatten()

    def look(self, seen: Seen) -> Finding:
        """Return the figures of each step, and their means over the chain."""
        numel = math.prod(seen.shape)
        triples = [seen.sums[i : i + 3] for i in range(0, len(seen.sums), 3)]
        means = [moved / numel if numel else 0.0 for moved, _, _ in triples]
        relatives = [_ratio(square, norm) for _, square, norm in triples]
        return {
            "mean": math.fsum(means) / len(means),
            "relative": math.fsum(relatives) / len(relatives),
            "steps": [{"mean": m, "relative": r} for m, r in zip(means, relatives, strict=True)],
            "sums": [list(triple) for triple in triples],
            "numel": numel,
        }

    def conclude(self, findings: Sequence[tuple[Seen, Finding]]) -> Mapping[str, Any]:
        """Return the figures of each family, the most sensitive first."""
        return {"families": self._families(findings)}

    def _families(self, findings: Sequence[tuple[Seen, Finding]]) -> list[dict[str, Any]]:
        held: dict[str, list[Finding]] = {}
        for seen, finding in findings:
            held.setdefault(family(seen.name, seen.place), []).append(finding)
        found = [_of_family(name, parts) for name, parts in held.items()]
        return sorted(found, key=lambda one: (-one[self.by], one["family"]))

    def listed(self, findings: Sequence[tuple[Seen, Finding]]) -> list[str]:
        """Return the most sensitive families, as patterns for the tuner `modules`."""
        return [one["family"] for one in self._families(findings)[: self.top]]


def family(name: str, place: Place) -> str:
    """Return a tensor's name with `*` for the number of its layer."""
    if place.layer is None:
        return name
    before = f"{place.stack}." if place.stack else ""
    return f"{before}*{name[len(before) + len(str(place.layer)) :]}"


def _of_family(name: str, parts: Sequence[Finding]) -> dict[str, Any]:
    steps = len(parts[0]["sums"])
    numel = sum(part["numel"] for part in parts)
    means, relatives = [], []
    for step in range(steps):
        moved, square, norm = (math.fsum(part["sums"][step][i] for part in parts) for i in range(3))
        means.append(moved / numel if numel else 0.0)
        relatives.append(_ratio(square, norm))
    return {
        "family": name,
        "tensors": len(parts),
        "mean": math.fsum(means) / steps,
        "relative": math.fsum(relatives) / steps,
    }


def _ratio(square: float, norm: float) -> float:
    """Return the ratio of two norms from their squares; 0 for a tensor of zeros."""
    return math.sqrt(square / norm) if norm else 0.0
