"""A distribution moved as far as experts were: the search, against the paper's grid by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_ft.algebra.shifting import moved, search
from mergekit_ft.errors import OperatorError

GRID = [i / 10 for i in range(21)]  # of the paper
Logits = tuple[Tensor, Tensor, list[Tensor]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis."""
    whole = logits - logits.max(axis=-1, keepdims=True)
    made: np.ndarray = whole - np.log(np.exp(whole).sum(axis=-1, keepdims=True))
    return made


def kl(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL of rows of log-probabilities."""
    made: np.ndarray = (np.exp(one) * (one - other)).sum(axis=-1)
    return made


def losses(case: Logits, active: int, alphas: list[float]) -> np.ndarray:
    """Return the paper's loss at one place for some factors, in float64."""
    base, small, *tuned = (x.double().numpy() for x in (case[0], case[1], *case[2]))
    p, q, *said = map(log_softmax, (base, small, *tuned))
    new = log_softmax(base + np.array(alphas)[:, None] * (tuned[active] - small))
    terms = [(kl(new, p) - kl(t, q)) ** 2 + (kl(p, new) - kl(q, t)) ** 2 for t in said]
    return np.sum(terms, axis=0)


def cases(count: int, seed: int) -> list[Logits]:
    """Return places of vocabularies, sharpnesses, likenesses and numbers of experts at random."""
    dice = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=dice))

    found = []
    for _ in range(count):
        width, experts = int(uniform(3, 120)), int(uniform(1, 4))
        base = torch.randn(1, width, generator=dice) * uniform(0.1, 6)
        near = uniform(0, 1)
        small = near * base + torch.randn(1, width, generator=dice) * uniform(0.1, 4)
        tuned = [
            small + torch.randn(1, width, generator=dice) * uniform(0.05, 4) for _ in range(experts)
        ]
        found.append((base, small, tuned))
    return found


def test_the_search_finds_the_grids_optimum_or_better_by_less_than_half_of_its_looks() -> None:
    looks = asked = 0
    for base, small, tuned in cases(1000, 0):
        found = search(base, small, tuned)
        case = (base, small, tuned)
        best = min(float(losses(case, active, GRID).min()) for active in range(len(tuned)))
        own = float(losses(case, int(found.expert), [float(found.alpha)])[0])
        assert own == pytest.approx(float(found.loss), rel=1e-9, abs=1e-12)
        assert own <= best + 1e-9 * (1 + best)
        looks, asked = looks + int(found.evaluations), asked + len(GRID) * len(tuned)
    assert looks <= asked / 2


def test_the_grid_is_the_papers() -> None:
    for base, small, tuned in cases(40, 1):
        found = search(base, small, tuned, how="grid")
        made = [losses((base, small, tuned), active, GRID) for active in range(len(tuned))]
        table = np.stack(made)
        active, at = np.unravel_index(table.argmin(), table.shape)
        alpha = GRID[at]
        assert (int(found.expert), round(float(found.alpha), 9)) == (active, alpha)


@pytest.mark.parametrize("how", ["grid", "bracket"])
def test_a_base_that_is_the_small_one_is_moved_all_the_way(how: str) -> None:
    base = torch.randn(20, 50, generator=torch.Generator().manual_seed(2)) * 3
    tuned = base + torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    found = search(base, base, [tuned], how=how)  # type: ignore[arg-type]
    assert torch.allclose(found.alpha, torch.ones(20).double(), rtol=0, atol=1e-6)
    fused = moved(base, base, [tuned], found.alpha[:, None])
    assert torch.allclose(fused, torch.log_softmax(tuned.double(), -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["grid", "bracket"])
def test_each_place_is_searched_anew(how: str) -> None:
    easy, hard = cases(2, 4)
    width = min(easy[0].shape[1], hard[0].shape[1])

    def both(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one[:, :width], other[:, :width]])

    base, small = both(easy[0], hard[0]), both(easy[1], hard[1])
    tuned = [both(easy[2][0], hard[2][0])]
    tuned[0][0] = small[0]  # nothing is wanted of the first: its loss is 0, less than any later
    together = search(base, small, tuned, how=how)  # type: ignore[arg-type]
    alone = search(base[1:], small[1:], [tuned[0][1:]], how=how)  # type: ignore[arg-type]
    assert together.loss[0] == 0
    assert together.loss[1] > 0
    assert torch.equal(together.alpha[1:], alone.alpha)
    assert torch.equal(together.loss[1:], alone.loss)


def test_each_expert_stays_within_its_own_bounds() -> None:
    base, small, tuned = cases(30, 5)[7]
    for low, high in ((0.2, 0.3), (1.5, 1.9)):
        found = search(base, small, tuned, [(low, high)] * len(tuned))
        assert low <= float(found.alpha) <= high
    with pytest.raises(OperatorError, match="0 <= low < high"):
        search(base, small, tuned, [(-1.0, 1.0)] * len(tuned))


def test_the_fused_distribution_is_the_formulas() -> None:
    for base, small, tuned in cases(50, 6):
        alpha = [0.3 + 0.5 * i for i in range(len(tuned))]
        logits = base.double() + sum(
            a * (t.double() - small.double()) for a, t in zip(alpha, tuned, strict=True)
        )
        wanted = torch.from_numpy(log_softmax(logits.numpy()))
        found = moved(base, small, tuned, alpha)
        assert torch.allclose(found.exp(), wanted.exp(), rtol=0, atol=1e-12)


def test_a_token_that_one_model_bans_is_banned_and_what_all_small_ones_ban_stays() -> None:
    base = torch.tensor([[1.0, 2.0, 0.5, 0.0]])
    small = torch.tensor([[0.3, 0.1, 0.2, -torch.inf]])
    tuned = torch.tensor([[0.9, -torch.inf, 0.1, -torch.inf]])
    found = moved(base, small, [tuned], [1.0]).exp()[0]
    # by hand: token 1 is out; 0 and 2 move by the small ones' log-probabilities among them
    q = torch.log_softmax(torch.tensor([0.3, 0.2]).double(), 0)
    t = torch.log_softmax(torch.tensor([0.9, 0.1]).double(), 0)
    logits = torch.tensor([1.0, 0.5, 0.0]).double() + torch.cat([t - q, torch.zeros(1).double()])
    assert found[1] == 0
    assert torch.allclose(found[[0, 2, 3]], torch.softmax(logits, 0), atol=1e-12)
    assert bool(search(base, small, [tuned]).loss.isfinite())
    with pytest.raises(OperatorError, match="the small models ban every token"):
        moved(base, small, [torch.full((1, 4), -torch.inf)], [1.0])
    with pytest.raises(OperatorError, match="NaN"):
        moved(base, small, [torch.full((1, 4), torch.nan)], [1.0])
