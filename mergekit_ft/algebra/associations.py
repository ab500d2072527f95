"""Key-value pairs written into a matrix in closed form: one exactly, or many by least squares.

Of W (d_out, d_in): K (d_in, n) are keys, R (d_out, n) = the values wanted there less W K, and
C = E[k k^T] (d_in, d_in) is of the keys that W meets in text. The textbook forms, and what is
computed instead, which is equal and needs C factored only once for all edits:

    one key    min tr(D C D^T)  with  D k = r                      (ROME; EMMET of one key)
               D = r (C^-1 k)^T / (k^T C^-1 k)
    many       min |D K - R|^2 + weight tr(D C D^T)                (MEMIT)
               D = R K^T (weight C + K K^T)^-1  =  R (weight I_n + K^T C^-1 K)^-1 K^T C^-1
    null space of P = U U^T, U (d_in, r) the eigenvectors of C below a threshold   (AlphaEdit)
               D = R K^T P (K K^T P + M P + ridge I)^-1
                 = R k^T (k k^T + m m^T + ridge I_r)^-1 U^T,  k = U^T K,  m m^T = U^T M U

All in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError

ENOUGH = 10  # tokens for each entry of a key, before C says anything of every direction
WORST = 1e12  # condition of C beyond which a solve in float64 keeps few digits
ROUNDS = 40  # of power iteration: the condition is a little underestimated, never over


class Metric:
    """C, factored once: solves C x = b for any b."""

    def __init__(self, second: Tensor) -> None:
        wide = second.double()
        require_finite(wide)
        self.factor, failed = torch.linalg.cholesky_ex(wide)  # (d_in, d_in) lower
        condition = float("inf") if bool(failed) else self._condition(wide)
        if not condition < WORST:
            told = "it is singular" if bool(failed) else f"its condition is {condition:.1e}"
            raise OperatorError(
                f"the keys' statistics cannot be inverted with any accuracy: {told}. Some "
                "directions were hardly met: give more text, or text of more kinds"
            )

    def solve(self, columns: Tensor) -> Tensor:
        """Return C^-1 columns: (d_in, n)."""
        return torch.cholesky_solve(columns, self.factor)

    def _condition(self, wide: Tensor) -> float:
        """Return the ratio of the largest to the least eigenvalue."""
        return _largest(lambda v: wide @ v, wide) * _largest(self.solve, wide)


def require_seen(tokens: int, width: int) -> None:
    """Refuse statistics of too few tokens: directions that were not met would look unused."""
    if tokens < ENOUGH * width:
        raise OperatorError(
            f"statistics of {tokens:,} tokens are too few for keys of {width:,} entries: at least "
            f"{ENOUGH * width:,} are needed, for directions that the text does not meet look as if "
            "the model had no use for them; give more text"
        )


def require_finite(second: Tensor) -> None:
    """Refuse statistics that hold what is no number."""
    if not bool(second.isfinite().all()):
        raise OperatorError("the keys' statistics hold NaN or Inf; the model's own values do")


def exact(key: Tensor, residual: Tensor, metric: Metric | None) -> Tensor:
    """Return D (d_out, d_in) of which D key = residual: (d_in,), (d_out,); no metric: C = I."""
    key, residual = key.double()[:, None], residual.double()
    along = key if metric is None else metric.solve(key)
    reached = (key * along).sum()
    if not bool(reached > 0):
        raise OperatorError("the key is zero: nothing that this matrix can do changes its value")
    return torch.outer(residual, along[:, 0] / reached)


def regularised(keys: Tensor, residuals: Tensor, metric: Metric, weight: float) -> Tensor:
    """Return D (d_out, d_in) that trades keys (d_in, n) -> residuals (d_out, n) against C."""
    keys, residuals = keys.double(), residuals.double()
    along = metric.solve(keys)  # (d_in, n) C^-1 K
    inner = keys.T @ along
    inner.diagonal().add_(weight)
    return residuals @ _solved(inner, along.T)


def null_space(second: Tensor, threshold: float) -> Tensor:
    """Return U (d_in, r), the eigenvectors of C whose eigenvalue is below the threshold."""
    wide = second.double()
    require_finite(wide)
    values, vectors = torch.linalg.eigh(wide)  # ascending
    rank = int((values < threshold).sum())
    if not rank:
        raise OperatorError(
            f"no direction of the keys has an eigenvalue below {threshold:g} (the least is "
            f"{float(values[0]):.2g}): nothing is left to write in; raise the threshold"
        )
    basis: Tensor = vectors[:, :rank].contiguous()
    return basis


def projected(
    keys: Tensor, residuals: Tensor, basis: Tensor, earlier: Tensor | None, ridge: float
) -> Tensor:
    """Return D (d_out, d_in) within the null space U; M is of `earlier` keys (d_in, m)."""
    inside = basis.T @ keys.double()  # (r, n)
    kept = inside if earlier is None else torch.cat([inside, basis.T @ earlier.double()], 1)
    inner = kept @ kept.T
    inner.diagonal().add_(ridge)
    return residuals.double() @ _solved(inner, inside).T @ basis.T


def _solved(positive: Tensor, columns: Tensor) -> Tensor:
    """Return the solution of a symmetric positive definite system."""
    factor, failed = torch.linalg.cholesky_ex(positive)
    if bool(failed):
        raise OperatorError(
            "the edits' keys are so nearly equal, or so large, that they cannot be told apart with "
            "a weight this small; raise it, or drop edits that repeat others"
        )
    return torch.cholesky_solve(columns, factor)


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Return the largest eigenvalue of a positive map, by power iteration from a fixed start."""
    dice = torch.Generator().manual_seed(0)
    start = torch.randn(len(like), 1, generator=dice, dtype=torch.float64).to(like.device)
    size = torch.ones((), dtype=torch.float64)
    for _ in range(ROUNDS):
        start = apply(start / start.norm())
        size = start.norm()
    return float(size)
