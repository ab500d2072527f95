"""Products of low rank near a matrix: by its Gram matrix, or by a random sketch of its range.

    X        (p, q), the matrix or its transpose, so that p <= q
    exact    X X^T = U diag(s^2) U^T, all of it
    sketch   Q = a basis of X Omega, improved by subspace iteration (Halko, Martinsson and Tropp
             2011, arXiv:0909.4061, algorithm 4.4), until the energy in it grows no more
    result   U_r U_r^T X, whose energy is the sum of the r largest s^2

All in float64. A product is returned as two factors of equal norm, column by column.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.errors import PlanError

EPSILON = 2.0**-23  # singular values below this share of the largest are float32's rounding
OVERSAMPLED = 16  # columns of a sketch beyond the rank
ITERATIONS = 8  # of a sketch, at most
SETTLED = 1e-4  # share of the energy by which one more iteration must not raise it


@dataclass(frozen=True)
class Product:
    """left @ right, and what is known of how near it is."""

    left: Tensor  # (m, r) float64
    right: Tensor  # (r, n) float64
    kept: float  # energy of the product
    total: float  # energy of the matrix
    iterations: int = 0  # of a sketch; 0 where the whole spectrum was taken
    gain: float = 0.0  # share of the energy by which the last iteration raised it

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.left.shape[1]


def by_gram(matrix: Tensor, rank: int | None, energy: float | None) -> Product:
    """Return the best product of at most `rank`, or of the least rank that keeps `energy`."""
    wide = _wide(matrix)
    squares, basis = eigen(wide @ wide.T)
    total = float(matrix.square().sum())
    count = rank_for(squares, total, rank, energy)
    chosen = basis[:, :count]
    return _product(matrix, chosen, chosen.T @ wide, total)


def by_sketch(matrix: Tensor, rank: int, energy: float | None, key: str) -> Product:
    """Return a product nearly as good as the best; `key` chooses the random directions."""
    wide, total = _wide(matrix), float(matrix.square().sum())
    width = min(rank + OVERSAMPLED, wide.shape[0])
    basis = orthonormal(wide @ _gaussian(wide.shape[1], width, key))
    held = gain = 0.0
    steps = 0
    while True:
        steps += 1
        along = wide.T @ basis  # (q, width)
        squares, turn = eigen(along.T @ along)
        before, held = held, float(squares[:rank].sum())
        gain = (held - before) / total if total else 0.0
        if gain <= SETTLED or steps == ITERATIONS:
            break
        basis = orthonormal(wide @ orthonormal(along))
    count = rank_for(squares, total, rank, energy)
    turn = turn[:, :count]
    return _product(matrix, basis @ turn, turn.T @ along.T, total, steps, max(gain, 0.0))


def require_cut(rank: int | None, energy: float | None) -> None:
    """Refuse a rank or an energy that nothing can have."""
    if rank is not None and rank < 1:
        raise PlanError(f"the rank is {rank}, and must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise PlanError(f"the energy is {energy:g}, and is a share above 0, up to 1")


def rank_for(squares: Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """Return how many of the descending squared singular values to keep."""
    meant = int((squares > EPSILON**2 * squares[0]).sum()) if len(squares) else 0
    most = min(meant, len(squares) if rank is None else rank)
    if energy is None:
        return most
    reached = torch.cumsum(squares, 0) >= energy * total
    first = int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else most
    return min(first, most)


def eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a Gram matrix, descending and never negative, and its vectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_(min=0.0), vectors.flip(1)


def orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of columns."""
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product where each column of left is as long as its row of right."""
    ratio = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    return left * ratio, right / ratio[:, None]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _product(
    matrix: Tensor, basis: Tensor, along: Tensor, total: float, steps: int = 0, gain: float = 0.0
) -> Product:
    """Return basis @ along, or its transpose where the matrix is tall."""
    kept = float(along.square().sum())
    left, right = balanced(basis, along)
    if matrix.shape[0] > matrix.shape[1]:
        left, right = right.T, left.T
    return Product(left, right, kept, total, steps, gain)


def _gaussian(rows: int, columns: int, key: str) -> Tensor:
    """Return (rows, columns) of normal numbers that the key alone decides."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    )
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def of_product(left: Tensor, right: Tensor, rank: int | None, energy: float | None) -> Product:
    """Return the best product of at most `rank`, or of the least rank that keeps `energy`."""
    mine, turn = torch.linalg.qr(left)
    theirs, other = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(turn @ other.T, full_matrices=False)
    squares = values.square()
    total = float(squares.sum())
    count = rank_for(squares, total, rank, energy)
    roots = values[:count].sqrt()
    kept = float(squares[:count].sum())
    return Product(
        (mine @ u[:, :count]) * roots, roots[:, None] * (v[:count] @ theirs.T), kept, total
    )


def product_energy(left: Tensor, right: Tensor) -> float:
    """Return the energy of left @ right, without making it."""
    if not left.shape[1]:
        return 0.0
    turn, other = torch.linalg.qr(left)[1], torch.linalg.qr(right.T)[1]
    return float((turn @ other.T).square().sum())
