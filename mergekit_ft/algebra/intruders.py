"""Intruder dimensions: singular vectors of a tuned matrix that the base's matrix has not.

Shuttleworth et al. 2024, arXiv:2410.21228, section 3: u_j of the tuned matrix, among those of the
`top` largest singular values, is an intruder where max_i |cos(u_j, u0_i)| < epsilon over all left
singular vectors u0_i of the base's matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Leading(NamedTuple):
    """The leading singular triplets of a tuned matrix, and how near the base has each."""

    u: Tensor  # (m, k)
    s: Tensor  # (k,) descending
    v: Tensor  # (n, k)
    nearest: Tensor  # (k,) max_i |cos(u_j, u0_i)|


def leading(base: Tensor, tuned: Tensor, top: int) -> Leading:
    """Return the triplets of (m, n) float64 matrices, and their nearest in the base."""
    basis = _left(base)  # (m, min(m, n))
    u, s, v = _largest(tuned, top)
    return Leading(u, s, v, (basis.T @ u).abs().amax(0).clamp(max=1.0))


def _left(matrix: Tensor) -> Tensor:
    """Return every left singular vector, orthonormal, by the Gram matrix of the shorter side.

    Several times faster than a decomposition, and as good for singular values above 1e-7 of the
    largest; those below have no directions of their own in a model's stored dtype.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    q, square = torch.linalg.qr(matrix) if tall else (None, matrix)
    vectors: Tensor = torch.linalg.eigh(square @ square.T).eigenvectors
    return vectors if q is None else q @ vectors


def _largest(matrix: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the triplets of the largest singular values, by the Gram matrix of the shorter side.

    In float64 the relative error of a vector is about 1e-16 (sigma_1 / sigma)^2 over its gap.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, : min(top, len(gram))]
    others = matrix.T @ vectors if wide else matrix @ vectors
    s = others.norm(dim=0)  # in the order of the eigenvalues, which are their squares
    others = others / s.clamp(min=torch.finfo(s.dtype).tiny)
    return (vectors, s, others) if wide else (others, s, vectors)
