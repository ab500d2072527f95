"""How far a distribution is moved at each place, searched so that the move is as large as experts'.

With P = softmax(base), P_a = softmax(base + a d_t), d_t = tuned_t - small, one expert at a time
(Fan et al. 2024, arXiv:2406.15480), the loss of expert t and factor a is

    sum_s [KL(P_a || P) - KL(Q_s || Q)]^2 + [KL(P || P_a) - KL(Q || Q_s)]^2

With d centred under P and Z = E_P[exp(a d)], KL(P_a || P) = a E_a[d] - log Z and KL(P || P_a) =
log Z. Both rise for a > 0 with derivatives a Var_a(d) and E_a[d], so that the minimum lies between
where either KL is met: Newton's steps, held in the bracket that the derivative's sign leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_ft.algebra.matching import both_kl
from mergekit_ft.errors import OperatorError

Bounds = tuple[float, float]
How = Literal["grid", "bracket"]
USUAL: Bounds = (0.0, 2.0)  # the paper's range
STEP = 0.1  # of the paper's grid
EVALUATIONS = 20  # of the bracketed search, most; about 4 will do, and the paper's grid has 21
SETTLED = 1e-10  # a step this small ends a search
PIECE = 1 << 20  # entries of a vocabulary that are computed with at a time


@dataclass(frozen=True)
class Shift:
    """What a search found at each of n places."""

    expert: Tensor  # (n,) the one that is active
    alpha: Tensor  # (n,) float64, its factor
    loss: Tensor  # (n,) float64
    evaluations: Tensor  # (n,) how often the vocabulary was gone through, all experts together


def search(
    base: Tensor,
    small: Tensor,
    tuned: Sequence[Tensor],
    bounds: Sequence[Bounds] | None = None,
    how: How = "bracket",
) -> Shift:
    """Return the best expert and factor of each place; every place is searched by itself.

    Logits (n, vocabulary), -inf where a token is banned. Of equal ones the first expert and the
    smallest factor. OperatorError where a logit is NaN or +inf, or a place has no token left.
    """
    limits = list(bounds or [USUAL] * len(tuned))
    _require(limits, tuned)
    size = max(1, PIECE // base.shape[-1])
    pieces = [
        _searched(base[at], small[at], [t[at] for t in tuned], limits, how)
        for at in (slice(i, i + size) for i in range(0, len(base), size))
    ]
    return Shift(*(torch.cat([getattr(p, name) for p in pieces]) for name in vars(pieces[0])))


def _require(limits: Sequence[Bounds], tuned: Sequence[Tensor]) -> None:
    if not tuned or len(limits) != len(tuned):
        raise OperatorError(f"{len(limits)} bounds of {len(tuned)} experts; give one of each")
    for low, high in limits:
        if not 0 <= low < high < float("inf"):
            raise OperatorError(
                f"bounds {low:g} to {high:g}: the search needs 0 <= low < high; a negative factor "
                "moves away from an expert, which no KL tells from moving to it"
            )


def _searched(
    base: Tensor, small: Tensor, tuned: Sequence[Tensor], limits: Sequence[Bounds], how: How
) -> Shift:
    parts = parted(base, small, tuned)
    targets = parts.targets()
    n = len(base)
    loss = torch.full((n,), torch.inf, dtype=torch.float64, device=base.device)  # anew each step
    alpha = torch.zeros_like(loss)
    which = torch.zeros(n, dtype=torch.long, device=base.device)
    count = torch.zeros_like(which)
    for t, (move, limit) in enumerate(zip(parts.moves, limits, strict=True)):
        curve = Curve(parts.logs, move, targets)
        found, value = (_gridded if how == "grid" else _bracketed)(curve, limit)
        count += curve.evaluations
        better = value < loss
        loss, alpha = torch.where(better, value, loss), torch.where(better, found, alpha)
        which = torch.where(better, t, which)
    return Shift(which, alpha, loss, count)


def moved(
    base: Tensor, small: Tensor, tuned: Sequence[Tensor], alpha: Sequence[float] | Tensor
) -> Tensor:
    """Return (n, vocabulary) float64 log-probabilities: each expert's move by its factor.

    `alpha` is (T,), or (n, T) by place.
    """
    parts = parted(base, small, tuned)
    factors = torch.as_tensor(alpha, dtype=torch.float64, device=base.device)
    logits = parts.logs
    for t, move in enumerate(parts.moves):
        logits = logits + factors[..., t].reshape(-1, 1) * move
    return torch.log_softmax(logits, -1)


@dataclass(frozen=True)
class Parts:
    """What the models say, float64; of tokens that nothing moves the moves are 0."""

    logs: Tensor  # (n, V) log P, -inf where a token is banned
    moves: list[Tensor]  # (n, V) of each expert
    quiet: Tensor  # (n, V) log Q
    said: list[Tensor]  # (n, V) log Q_t

    def targets(self) -> Tensor:
        """Return (T, 2, n) KL(Q_t || Q) and KL(Q || Q_t)."""
        return torch.stack([both_kl(x, self.quiet) for x in self.said])


def parted(base: Tensor, small: Tensor, tuned: Sequence[Tensor]) -> Parts:
    """Return what models of (n, vocabulary) logits say, and how each expert moves it.

    A token that one model bans is banned; what the small ones ban alike moves nothing.
    """
    rows = [x.double() for x in (base, small, *tuned)]
    for x in rows:
        if bool(torch.isnan(x).any()) or bool((x == torch.inf).any()):
            raise OperatorError("logits hold NaN or +inf; `mergekit-ft inspect` finds such weights")
    silent = torch.stack([x.isneginf() for x in rows[1:]])
    banned = rows[0].isneginf() | (silent.any(0) & ~silent.all(0))
    if bool(banned.all(-1).any()):
        raise OperatorError("every token is banned by one model or another, so none can come next")
    logs, quiet, *said = (torch.log_softmax(x.masked_fill(banned, -torch.inf), -1) for x in rows)
    unheard = banned | silent.all(0)
    if bool(unheard.all(-1).any()):
        raise OperatorError("the small models ban every token that the large one would say")
    moves = [(x - quiet).masked_fill(unheard, 0.0) for x in said]
    low = -1e4  # a chance of 0, and differences that are numbers
    quiet, *said = (x.masked_fill(unheard, low) for x in (quiet, *said))
    return Parts(logs, moves, quiet, said)


class Curve:
    """The loss of one expert over its factor, at n places; counts how often it is computed."""

    def __init__(self, logs: Tensor, move: Tensor, targets: Tensor) -> None:
        chances = logs.exp()
        mean = (chances * move).sum(-1, keepdim=True)
        self.logs, self.move = logs, move - mean  # (n, V); the move's mean under P is 0
        self.targets = targets  # (T, 2, n)
        self.wanted = targets.mean(0)  # (2, n)
        self.spread = (chances * self.move.square()).sum(-1)  # (n,) Var_0
        self.evaluations = torch.ones(len(logs), dtype=torch.long, device=logs.device)

    def values(self, alpha: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, half its derivative by T, and a positive curvature to step by."""
        self.evaluations[rows] += 1
        move = self.move[rows]
        logits = self.logs[rows] + alpha[:, None] * move
        whole = torch.logsumexp(logits, -1, keepdim=True)
        chances = (logits - whole).exp_()
        mean = (chances * move).sum(-1)
        centred = move - mean[:, None]
        weighted = chances * centred
        weighted *= centred
        spread = weighted.sum(-1)
        skew = (weighted * centred).sum(-1)
        back = whole[:, 0].clamp(min=0)  # KL(P || P_a)
        there = (alpha * mean - whole[:, 0]).clamp(min=0)  # KL(P_a || P)
        a, b = there - self.wanted[0, rows], back - self.wanted[1, rows]
        slope = a * alpha * spread + b * mean
        plain = (alpha * spread).square() + mean.square()
        curved = plain + a * (spread + alpha * skew) + b * spread
        curved = torch.where(curved > 0.1 * plain, curved, plain)  # Gauss's step, where it bends
        return self.loss(there, back, rows), slope, curved

    def loss(self, there: Tensor, back: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of KLs, (m,)."""
        return (torch.stack([there, back]) - self.targets[:, :, rows]).square().sum((0, 1))

    def still(self) -> Tensor:
        """Return the loss of not moving, (n,), which costs nothing."""
        return self.targets.square().sum((0, 1))


def _gridded(curve: Curve, limit: Bounds) -> tuple[Tensor, Tensor]:
    """Return the best factor of the paper's grid, and its loss."""
    low, high = limit
    points = torch.linspace(low, high, round((high - low) / STEP) + 1, dtype=torch.float64)
    rows = torch.arange(len(curve.logs), device=curve.logs.device)
    best = torch.full_like(curve.spread, torch.inf)
    found = torch.full_like(best, low)
    for point in points.tolist():
        loss, _, _ = curve.values(torch.full_like(best, point), rows)
        better = loss < best
        best, found = torch.where(better, loss, best), torch.where(better, point, found)
    return found, best


def _bracketed(curve: Curve, limit: Bounds) -> tuple[Tensor, Tensor]:
    """Return the least point that Newton's steps meet between the bounds, and its loss."""
    low = torch.full_like(curve.spread, limit[0])
    high = torch.full_like(low, limit[1])
    best = curve.still() if limit[0] == 0 else torch.full_like(low, torch.inf)
    found = low.clone()
    start = (curve.wanted.sum(0) / curve.spread).sqrt()  # of a move that is small
    at = torch.where(start.isfinite(), start, limit[0]).clamp(limit[0], limit[1])
    moved = curve.spread > 0  # a move of nothing is no move
    if limit[0] == 0:
        moved &= at > 0  # the experts differ in nothing
    else:
        moved |= best.isinf()
    rows = moved.nonzero()[:, 0]
    bisected = torch.zeros_like(low, dtype=torch.bool)
    last = torch.full_like(low, torch.inf)
    for _ in range(EVALUATIONS - 1):
        if not len(rows):
            break
        x = at[rows]
        loss, slope, curved = curve.values(x, rows)
        better = loss < best[rows]
        best[rows] = torch.where(better, loss, best[rows])
        found[rows] = torch.where(better, x, found[rows])
        before = high[rows] - low[rows]
        low[rows] = torch.where(slope < 0, x, low[rows])
        below = torch.nextafter(x, torch.zeros_like(x))  # a bound that was tried is one no more
        high[rows] = torch.where(slope >= 0, below, high[rows])
        then = _next(x, slope, curved, low[rows], high[rows], limit)
        wide, step = high[rows] - low[rows] > 0.5 * before, (then - x).abs()
        slow = wide & (step > 0.5 * last[rows])  # as where both KLs grow by powers of the factor
        half = torch.where(high[rows] == limit[1], limit[1], (low[rows] + high[rows]) / 2)
        then = torch.where(slow & ~bisected[rows], half, then)
        bisected[rows] = slow
        last[rows], at[rows] = (then - x).abs(), then
        rows = rows[((then - x).abs() > SETTLED) & (slope != 0)]
    return found, best


def _next(
    x: Tensor, slope: Tensor, curved: Tensor, low: Tensor, high: Tensor, limit: Bounds
) -> Tensor:
    """Return Newton's next point, a bound where it leads there, or the middle of the bracket."""
    then = x - slope / curved
    inside = (curved > 0) & (then > low) & (then < high)
    to_high = (high == limit[1]) & (slope < 0) & ~inside
    to_low = (curved > 0) & (then <= low) & (low == limit[0]) & (limit[0] > 0)
    then = torch.where(inside, then, (low + high) / 2)
    return torch.where(to_high, high, torch.where(to_low, low, then))
