"""Intruder dimensions (Shuttleworth et al. 2024, arXiv:2410.21228, section 3).

Of each matrix W of attention and feed-forward layers, W_0 the base's:

    u_j, s_j   the left singular vectors and values of W, the `k` largest s_j
    nearest    max_i |cos(u_j, u0_i)| over all left singular vectors u0_i of W_0
    intruder   a u_j whose nearest is below `epsilon`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from mergekit_ft.algebra.intruders import leading
from mergekit_ft.layers import Place, role_of
from mergekit_ft.looking import Finding, Probe, Seen


class IntruderDimensions(Probe):
    """Count, in every matrix, the directions that tuning added."""

    sees_whole: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("intruders", "least_nearest", "largest_sigma")
    unit: ClassVar[str] = "intruders among the k largest"

    k: int = Field(10, ge=1, description="singular vectors that are looked at, the largest first")
    epsilon: float = Field(0.5, gt=0, le=1, description="nearest cosine below which one intrudes")

    def wants(self, name: str, place: Place, shape: tuple[int, ...]) -> bool:
        """Say whether a tensor is a matrix of a layer, or a stack of them (experts)."""
        matrix = len(shape) in (2, 3) and min(shape[-2:]) > 1
        return matrix and place.layer is not None and role_of(name) in ("other", "block")

    def look(self, seen: Seen) -> Finding:
        """Return how many intrude, which, and how near the base has each of the k."""
        base, tuned = (part.reshape(-1, *part.shape[-2:]) for part in seen.whole)
        found = [self._matrix(*pair, seen.transposed) for pair in zip(base, tuned, strict=True)]
        nearest = [value for one in found for value in one["nearest"]]
        return {
            "intruders": sum(len(one["which"]) for one in found),
            "least_nearest": min(nearest),
            "largest_sigma": max((s for one in found for s in one["sigmas"]), default=0.0),
            "looked_at": len(nearest),
            "matrices": found,
        }

    def _matrix(self, base: Any, tuned: Any, transposed: bool) -> Finding:
        triplets = leading(base.T, tuned.T, self.k) if transposed else leading(base, tuned, self.k)
        nearest, sigmas = triplets.nearest.tolist(), triplets.s.tolist()
        which = [j for j, near in enumerate(nearest) if near < self.epsilon]
        return {"which": which, "nearest": nearest, "sigmas": [sigmas[j] for j in which]}

    def conclude(self, findings: Sequence[tuple[Seen, Finding]]) -> Mapping[str, Any]:
        """Return the sums over the model."""
        having = [finding for _, finding in findings if finding["intruders"]]
        return {
            "intruders": sum(finding["intruders"] for _, finding in findings),
            "looked_at": sum(finding["looked_at"] for _, finding in findings),
            "matrices_with_intruders": len(having),
            "matrices": len(findings),
        }

    def listed(self, findings: Sequence[tuple[Seen, Finding]]) -> list[str]:
        """Return the matrices that have intruders, the most first."""
        having = [(f["intruders"], seen.name) for seen, f in findings if f["intruders"]]
        return [name for _, name in sorted(having, key=lambda pair: (-pair[0], pair[1]))]
