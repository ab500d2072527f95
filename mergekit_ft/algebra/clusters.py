"""k-means: points to the nearest of k centres, centres to the mean of their points (Lloyd 1982)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError

MOST = 300  # rounds
PIECE = 1 << 22  # distances that are held at a time


@dataclass(frozen=True)
class Clusters:
    """Where n points belong."""

    centres: Tensor  # (k, d) float64
    of: Tensor  # (n,) the nearest centre; of equal ones the first
    inertia: float  # sum of squared distances to it


def clustered(points: Tensor, k: int, seed: int, tries: int = 5) -> Clusters:
    """Return the best of several k-means of (n, d) points, each from centres drawn by `seed`.

    Centres are drawn by squared distance to those drawn before (k-means++: Arthur and
    Vassilvitskii 2007). OperatorError where there are fewer distinct points than k.
    """
    points = points.double()
    if not bool(points.isfinite().all()):
        raise OperatorError("a point is not of numbers")
    dice = torch.Generator().manual_seed(seed)
    found = [lloyd(points, drawn(points, k, dice)) for _ in range(tries)]
    return min(found, key=lambda made: made.inertia)


def drawn(points: Tensor, k: int, dice: torch.Generator) -> Tensor:
    """Return (k, d) of the (n, d) points, each drawn by its squared distance to those before."""
    at = [int(torch.randint(len(points), (), generator=dice))]
    far = (points - points[at[0]]).square().sum(dim=1)
    while len(at) < k:
        if not bool(far.any()):
            raise OperatorError(f"{k} clusters of {len(at)} distinct points: ask for fewer")
        at.append(int(torch.multinomial(far / far.sum(), 1, generator=dice)))
        far = torch.minimum(far, (points - points[at[-1]]).square().sum(dim=1))
    return points[at]


def lloyd(points: Tensor, centres: Tensor) -> Clusters:
    """Return the clusters that centres come to rest in; one that is left empty takes the farthest.

    float64; points (n, d), centres (k, d).
    """
    of = torch.full((len(points),), -1)
    for _ in range(MOST):
        distances, nearest = closest(points, centres)
        if torch.equal(nearest, of):
            break
        of = nearest
        sums = torch.zeros_like(centres).index_add_(0, of, points)
        counts = torch.bincount(of, minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            farthest = int(distances.argmax())
            centres[empty], distances[farthest] = points[farthest], 0.0
    distances, of = closest(points, centres)
    return Clusters(centres, of, float(distances.sum()))


def closest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) squared distances to the nearest of (k, d) centres, and which that is."""
    size = max(1, PIECE // len(centres))
    found = [
        torch.cdist(some, centres, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        for some in torch.split(points, size)
    ]
    return torch.cat([f.values for f in found]).square(), torch.cat([f.indices for f in found])


def silhouette(points: Tensor, made: Clusters) -> float:
    """Return the simplified silhouette: the mean of (b - a) / max(a, b), -1 to 1.

    a is a point's distance to its own centre, b to the nearest other one (Hruschka et al. 2004).
    """
    points = points.double()
    if len(made.centres) < 2:
        return 0.0
    total = 0.0
    for some, own in zip(torch.split(points, 4096), torch.split(made.of, 4096), strict=True):
        distances = torch.cdist(some, made.centres, compute_mode="donot_use_mm_for_euclid_dist")
        a = distances.gather(1, own[:, None])[:, 0]
        b = distances.scatter(1, own[:, None], torch.inf).min(dim=1).values
        total += float(((b - a) / torch.maximum(a, b).clamp(min=1e-300)).sum())
    return total / len(points)
