"""Fits of logit fusion: against scipy, the formulas written out, and cases worked by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mergekit_ft import registry
from mergekit_ft.algebra.boxes import minimise
from mergekit_ft.errors import OperatorError
from mergekit_ft.fusing import Fitted, Heard

N, V = 40, 13


@dataclass(frozen=True)
class Pieces:
    """Places held in memory, so many at a time."""

    heard: Heard
    size: int = 7

    @property
    def experts(self) -> int:
        return len(self.heard.tuned)

    def __iter__(self) -> Iterator[Heard]:
        for start in range(0, len(self.heard.targets), self.size):
            yield part(self.heard, torch.arange(start, min(start + self.size, self.n)))

    @property
    def n(self) -> int:
        return len(self.heard.targets)


def part(heard: Heard, at: Tensor) -> Heard:
    teacher = None if heard.teacher is None else heard.teacher[at]
    return Heard(
        heard.base[at],
        heard.small[at],
        heard.tuned[:, at],
        heard.targets[at],
        heard.weights[at],
        teacher,
    )


def places(seed: int, k: int = 2, *, apart: bool = True, spread: float = 1.5) -> Heard:
    """Return random logits; targets follow the experts in part, so that fits are inside."""
    dice = torch.Generator().manual_seed(seed)
    small = torch.randn(N, V, generator=dice)
    base = small + torch.randn(N, V, generator=dice) if apart else small
    moves = spread * torch.randn(k, N, V, generator=dice)
    truth = torch.softmax(base + 0.7 * moves.sum(0), -1)
    targets = torch.multinomial(truth, 1, generator=dice)[:, 0]
    weights = torch.randint(1, 4, (N,), generator=dice).double()
    teacher = base + 0.9 * moves[0] + torch.randn(N, V, generator=dice)
    return Heard(base, small, small + moves, targets, weights, teacher)


def fitted(heard: Heard, size: int = 7, **parameters: Any) -> Fitted:
    fusion = registry.of_kind("dynamic_logit_fusion", "fusion")(**parameters)
    found: Fitted = fusion.fit(Pieces(heard, size))
    return found


def loss(heard: Heard, alpha: Sequence[float], objective: str, ridge: float) -> float:
    """Return the loss by the formula, place by place."""
    base, small, tuned = (x.double().numpy() for x in (heard.base, heard.small, heard.tuned))
    total = 0.0
    for n in range(len(base)):
        logits = base[n] + sum(a * (t[n] - small[n]) for a, t in zip(alpha, tuned, strict=True))
        logs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        weight = float(heard.weights[n] / heard.weights.sum())
        if objective == "nll":
            total -= weight * logs[int(heard.targets[n])]
        else:
            assert heard.teacher is not None
            wanted = heard.teacher[n].double().numpy()
            wanted = wanted - np.log(np.exp(wanted).sum())
            total += weight * float((np.exp(wanted) * (wanted - logs)).sum())
    return total + 0.5 * ridge * sum(a * a for a in alpha)


@pytest.mark.parametrize("objective", ["nll", "kl"])
@pytest.mark.parametrize(("seed", "k", "high"), [(0, 1, 2.0), (1, 2, 2.0), (2, 3, 2.0), (3, 2, 0.4),
                                                 (4, 3, 0.5)])  # fmt: skip
def test_fits_are_scipys_optimum_in_the_box(objective: str, seed: int, k: int, high: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    heard = places(seed, k)
    ours = fitted(heard, objective=objective, high=high)
    theirs = optimize.minimize(
        lambda a: loss(heard, a, objective, 1e-3),
        np.full(k, 0.2),
        method="L-BFGS-B",
        bounds=[(0, high)] * k,
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    assert ours.alpha == pytest.approx(theirs.x, abs=1e-4)
    assert ours.facts["loss"] == pytest.approx(theirs.fun, abs=1e-8)
    assert ours.facts["loss"] == pytest.approx(loss(heard, ours.alpha, objective, 1e-3), abs=1e-12)
    assert ours.facts["steps"] <= 10


def test_without_bounds_a_weight_leaves_the_box() -> None:
    heard = places(3)
    backwards = replace(heard, tuned=2 * heard.small - heard.tuned)
    assert min(fitted(backwards, low=None, high=None).alpha) < 0
    assert fitted(backwards).alpha == (0.0, 0.0)
    assert fitted(backwards).facts["at_bound"] == [True, True]


def test_neither_order_nor_pieces_change_a_bit() -> None:
    heard = places(5, 3)
    found = fitted(heard, 7)
    shuffled = part(heard, torch.randperm(N, generator=torch.Generator().manual_seed(1)))
    for other, size in ((heard, 1), (heard, N), (shuffled, 9)):
        assert fitted(other, size) == found


def test_a_weight_of_two_is_a_place_twice() -> None:
    heard = replace(places(6), weights=torch.ones(N, dtype=torch.float64))
    doubled = replace(heard, weights=heard.weights + (torch.arange(N) < 5))
    twice = part(heard, torch.cat([torch.arange(N), torch.arange(5)]))
    assert fitted(doubled).alpha == pytest.approx(fitted(twice).alpha, abs=1e-12)


def test_two_words_worked_by_hand() -> None:
    """Base even, expert one logit up for the word that came 3 times of 4: sigma(a) = 3/4."""
    base = torch.zeros(4, 2)
    tuned = torch.tensor([1.0, 0.0]).expand(1, 4, 2)
    heard = Heard(base, base, tuned, torch.tensor([0, 0, 0, 1]), torch.ones(4).double())
    found = fitted(heard, ridge=0.0)
    assert found.alpha == pytest.approx([math.log(3)], abs=1e-9)
    assert found.facts["hessian_eigenvalues"] == pytest.approx([3 / 16], abs=1e-9)
    even = replace(heard, targets=torch.tensor([0, 0, 1, 1]))
    assert fitted(even, ridge=0.0).alpha == pytest.approx([0.0], abs=1e-9)


def test_an_expert_like_the_base_is_left_to_the_ridge_and_told() -> None:
    heard = places(7)
    idle = replace(heard, tuned=torch.stack([heard.tuned[0], heard.small]))
    found = fitted(idle, centre=0.3)
    assert found.alpha[1] == pytest.approx(0.3, abs=1e-12)
    assert found.facts["flat"] == [False, True]
    assert fitted(idle, ridge=0.0).facts["flat"] == [False, True]


def test_a_teacher_in_the_family_is_found() -> None:
    heard = places(8)
    moves = heard.tuned - heard.small
    taught = replace(heard, teacher=heard.base + 1.3 * moves[0] + 0.4 * moves[1])
    found = fitted(taught, objective="kl", ridge=0.0)
    assert found.alpha == pytest.approx([1.3, 0.4], abs=1e-5)
    assert found.facts["loss"] == pytest.approx(0.0, abs=1e-9)


def test_dlf_of_one_expert_of_the_same_size_is_one() -> None:
    found = fitted(places(9, 1, apart=False), objective="dlf")
    assert found.alpha == pytest.approx([1.0], abs=1e-9)
    assert found.facts["chosen"] == [1.0]


def test_dlf_takes_the_best_of_each_places_grid() -> None:
    heard = places(10, 2)
    sums = [0.0, 0.0]
    for n in range(N):
        best = (math.inf, 0, 0.0)
        for t in range(2):
            for i in range(21):
                best = min(best, (matching(heard, n, t, i / 10), t, i / 10))
        sums[best[1]] += float(heard.weights[n]) * best[2]
    wanted = [s / float(heard.weights.sum()) for s in sums]
    assert fitted(heard, objective="dlf").alpha == pytest.approx(wanted, abs=1e-9)


def matching(heard: Heard, n: int, t: int, alpha: float) -> float:
    def logs(x: Tensor) -> Tensor:
        return torch.log_softmax(x.double(), -1)

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum())

    p, q = logs(heard.base[n]), logs(heard.small[n])
    fused = logs(heard.base[n].double() + alpha * (heard.tuned[t, n] - heard.small[n]).double())
    total = 0.0
    for expert in heard.tuned:
        e = logs(expert[n])
        total += (kl(fused, p) - kl(e, q)) ** 2 + (kl(p, fused) - kl(q, e)) ** 2
    return total


def test_what_contradicts_itself_is_refused() -> None:
    fusion = registry.of_kind("dynamic_logit_fusion", "fusion")
    for words in ({"low": 2.0, "high": 1.0}, {"objective": "dlf", "high": None},
                  {"objective": "dlf", "ridge": 0.1}, {"ridge": -1.0}):  # fmt: skip
        with pytest.raises(ValidationError):
            fusion(**words)


def test_values_that_are_not_numbers_are_refused() -> None:
    heard = places(11)
    broken = replace(heard, base=torch.where(heard.base > 2, torch.nan, heard.base))
    for objective in ("nll", "kl", "dlf"):
        with pytest.raises(OperatorError, match="not numbers"):
            fitted(broken, objective=objective)


def test_rounding_of_values_does_not_hold_the_last_step_up() -> None:
    asked: list[float] = []

    def bowl(x: Tensor) -> tuple[float, Tensor, Tensor]:
        asked.append(float(x[0]))
        away = x - 1 / 3
        flat = 1e6 + float(torch.cosh(away).sum())  # what is left of it near 1/3 is rounding
        return flat, torch.sinh(away), torch.diag(torch.cosh(away))

    wide = torch.full((1,), 5.0, dtype=torch.float64)
    found = minimise(bowl, torch.zeros(1), -wide, wide)
    assert found.at.tolist() == pytest.approx([1 / 3], abs=1e-9)
    assert len(asked) < 10
