"""DARE-TIES: drop entries at random, rescale the rest, merge those whose sign is elected."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.dare_linear import DareLinear
from mergekit_ft.methods.dare_ties import DareTies
from tests.merging import Case, vectors

N = 100_000


def case(*task_vectors: Any, **parameters: Any) -> Case:
    for name in ("weight", "density"):
        parameters.setdefault(name, (1.0,) * len(task_vectors))
    operator = DareTies.model_validate(parameters)
    return Case(operator, torch.zeros(len(task_vectors[0])), *task_vectors)


def test_where_nothing_is_dropped_the_agreeing_are_added() -> None:
    # 1 + 3 - 2 > 0: 1 + 3
    assert case([1.0], [3.0], [-2.0]).merged().tolist() == [4.0]


def test_normalised_the_agreeing_are_averaged_by_their_weights() -> None:
    # 1 * 1 + 3 * 3 - 1 * 2 > 0: (1 + 9) / (1 + 3)
    case_ = case([1.0], [3.0], [-2.0], weight=(1.0, 3.0, 1.0), normalize=True)
    assert case_.merged().tolist() == [2.5]


def test_an_even_vote_elects_plus() -> None:
    assert case([-2.0], [2.0]).merged().tolist() == [2.0]


def test_lambda_scales_the_merged_delta() -> None:
    assert case([1.0], [3.0], **{"lambda": 0.25}).merged().tolist() == [1.0]


def test_what_is_dropped_has_no_vote() -> None:
    # +1 against -3, each kept by half: -3 wins where it is kept, +1 only where it alone is
    merged = case(torch.ones(N), torch.full((N,), -3.0), density=(0.5, 0.5), rescale=False).merged()
    shares = {value: float((merged == value).sum()) / N for value in (-3.0, 0.0, 1.0)}
    spread = 5 * sqrt(0.25 / N)
    assert shares == {
        -3.0: pytest.approx(0.5, abs=spread),
        0.0: pytest.approx(0.25, abs=spread),
        1.0: pytest.approx(0.25, abs=spread),
    }


def test_rescaling_by_density_is_unbiased() -> None:
    # of one model there is no vote to lose: N entries of 2, kept by 1/5 at 2 * 5
    merged = case(torch.full((N,), 2.0), density=(0.2,), rescaling="density").merged()
    assert set(merged.tolist()) == {0.0, 10.0}
    assert abs(float(merged.double().sum()) - 2 * N) < 5 * sqrt(N * 4 * 0.8 / 0.2)


def test_rescaling_by_norm_restores_the_norm() -> None:
    # |values| = 500 * 501 / 2 + 499 * 500 / 2 = 250,000
    merged = case(torch.arange(1000.0) - 500, density=(0.3,)).merged().double()
    assert float(merged.abs().sum()) == pytest.approx(250_000, rel=1e-6)


def test_its_masks_are_those_of_dare_linear() -> None:
    same: dict[str, Any] = {"weight": (1.0,), "density": (0.5,), "seed": 3}
    model = torch.arange(1.0, 1001.0)
    one, other = (
        Case(kind.model_validate(same), torch.zeros(1000), model).merged()
        for kind in (DareLinear, DareTies)
    )
    assert torch.equal(one, other)
    assert 0 < int((one == 0).sum()) < 1000


def test_a_model_that_alone_is_heard_is_copied_unless_it_is_dropped_from() -> None:
    assert DareTies(weight=(0.0, 1.0), density=(1.0, 1.0)).copies(2, "w", NOWHERE) == 1
    assert DareTies(weight=(0.0, 1.0), density=(1.0, 0.5)).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("rescaling", ["norm", "density"])
@pytest.mark.parametrize("normalize", [True, False])
def test_blocks_merge_to_the_float64_reference(normalize: bool, rescaling: str) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = DareTies(
        weight=(1.0, 0.5, 0.25),
        density=(0.5, 0.25, 1.0),
        rescaling=rescaling,
        normalize=normalize,
        lambda_=0.5,
        seed=7,
    )
    whole = Case(operator, base, *tuned)
    torch.testing.assert_close(whole.merged().double(), whole.reference(), rtol=1e-5, atol=1e-5)
