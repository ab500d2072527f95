"""DELLA: drop the smaller entries the likelier, rescale, merge those whose sign is elected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.della import Della
from mergekit_ft.methods.della_linear import DellaLinear
from tests.merging import Case, vectors


def case(*task_vectors: Any, **parameters: Any) -> Case:
    for name, default in {"weight": 1.0, "density": 1.0, "epsilon": 0.1}.items():
        parameters.setdefault(name, (default,) * len(task_vectors))
    operator = Della.model_validate(parameters)
    return Case(operator, torch.zeros(len(task_vectors[0])), *task_vectors)


def test_where_nothing_is_dropped_the_agreeing_are_averaged() -> None:
    # 1 + 3 - 2 > 0: (1 + 3) / 2
    assert case([1.0], [3.0], [-2.0]).merged().tolist() == [2.0]


def test_the_mean_is_weighted_and_without_normalising_it_is_a_sum() -> None:
    # 1 * 1 + 3 * 3 - 1 * 2 > 0: 1 + 9, divided by 1 + 3
    weight = (1.0, 3.0, 1.0)
    assert case([1.0], [3.0], [-2.0], weight=weight).merged().tolist() == [2.5]
    summed = case([1.0], [3.0], [-2.0], weight=weight, normalize=False)
    assert summed.merged().tolist() == [10.0]


def test_an_even_vote_elects_plus() -> None:
    assert case([-2.0], [2.0]).merged().tolist() == [2.0]


def test_lambda_scales_the_merged_delta() -> None:
    assert case([1.0], [3.0], **{"lambda": 0.25}).merged().tolist() == [0.5]


def test_what_is_dropped_has_no_vote() -> None:
    # +1 against -3, both kept by about half: -3 wins where it is kept, +1 only where it alone is
    n = 50_000
    merged = case(
        torch.ones(n),
        torch.full((n,), -3.0),
        density=(0.5, 0.5),
        epsilon=(0.0, 0.0),
        rescale=False,
    ).merged()
    shares = {value: float((merged == value).sum()) / n for value in (-3.0, 0.0, 1.0)}
    assert shares == {
        -3.0: pytest.approx(0.5, abs=0.012),
        0.0: pytest.approx(0.25, abs=0.012),
        1.0: pytest.approx(0.25, abs=0.012),
    }


def test_its_masks_are_those_of_della_linear() -> None:
    same: dict[str, Any] = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.2,), "seed": 3}
    model = torch.arange(1.0, 1001.0)
    one, other = (
        Case(kind.model_validate(same), torch.zeros(1000), model, shape=(10, 100)).merged()
        for kind in (DellaLinear, Della)
    )
    assert torch.equal(one, other)
    assert 0 < int((one == 0).sum()) < 1000


def test_a_model_that_alone_is_heard_is_copied_unless_it_is_dropped_from() -> None:
    whole = Della(weight=(0.0, 0.7), density=(1.0, 1.0), epsilon=(0.1, 0.1))
    assert whole.copies(2, "w", NOWHERE) == 1
    assert whole.model_copy(update={"density": (1.0, 0.5)}).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("rescaling", ["norm", "probability"])
@pytest.mark.parametrize("normalize", [True, False])
def test_blocks_merge_to_the_float64_reference(normalize: bool, rescaling: str) -> None:
    base, *tuned = vectors(3, 300 * 451)
    assert base.numel() > CELL
    operator = Della(
        weight=(1.0, 0.5, 0.25),
        density=(0.5, 0.25, 1.0),
        epsilon=(0.2, 0.1, 0.3),
        rescaling=rescaling,
        normalize=normalize,
        lambda_=0.5,
        seed=7,
    )
    whole = Case(operator, base, *tuned, shape=(300, 451))
    torch.testing.assert_close(whole.merged().double(), whole.reference(), rtol=1e-5, atol=1e-5)
