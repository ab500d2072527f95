"""Breadcrumbs-TIES: drop the largest and the smallest entries, merge those that agree in sign."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.breadcrumbs import Breadcrumbs
from mergekit_ft.methods.breadcrumbs_ties import BreadcrumbsTies
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], **parameters: Any) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    for name, default in {"weight": 1.0, "density": 1.0, "gamma": 0.0}.items():
        value = parameters.setdefault(name, default)
        if isinstance(value, float):
            parameters[name] = (value,) * len(task_vectors)
    zeros = [0.0] * len(task_vectors[0])
    return Case(BreadcrumbsTies.model_validate(parameters), zeros, *task_vectors).merged().tolist()


def test_where_nothing_goes_the_agreeing_are_added() -> None:
    # 1 + 3 - 2 > 0: 1 + 3
    assert delta([1.0], [3.0], [-2.0]) == [4.0]


def test_normalised_the_agreeing_are_averaged_by_their_weights() -> None:
    # 1 * 1 + 3 * 3 - 1 * 2 > 0: (1 + 9) / (1 + 3)
    assert delta([1.0], [3.0], [-2.0], weight=(1.0, 3.0, 1.0), normalize=True) == [2.5]


def test_an_even_vote_elects_plus() -> None:
    assert delta([-2.0], [2.0]) == [2.0]


def test_an_outlier_has_no_vote() -> None:
    # 9 goes at the top: (0, 3, 0) and (-1, 0, 0); without that 9 - 1 would have elected plus
    merged = delta([9.0, 3.0, 1.0], [-1.0, 0.5, 4.0], density=0.34, gamma=0.34)
    assert merged == [-1.0, 3.0, 0.0]


def test_lambda_scales_the_merged_delta() -> None:
    assert delta([1.0], [3.0], **{"lambda": 0.25}) == [1.0]


def test_its_masks_are_those_of_breadcrumbs() -> None:
    base, model = vectors(1, 1000)
    same: dict[str, Any] = {"weight": (1.0,), "density": (0.3,), "gamma": (0.1,), "rescale": True}
    one, other = (
        Case(kind.model_validate(same), base, model).merged()
        for kind in (Breadcrumbs, BreadcrumbsTies)
    )
    assert torch.equal(one, other)
    assert int((one != 0).sum()) == 300


def test_a_model_that_alone_is_heard_is_copied_unless_entries_go() -> None:
    whole = BreadcrumbsTies(weight=(0.0, 1.0), density=(1.0, 1.0))
    assert whole.copies(2, "w", NOWHERE) == 1
    assert whole.model_copy(update={"density": (1.0, 0.5)}).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_blocks_merge_to_the_float64_reference(normalize: bool, rescale: bool) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = BreadcrumbsTies(
        weight=(1.0, 0.5, 0.25),
        density=(0.2, 0.5, 1.0),
        gamma=(0.1, 0.0, 0.3),
        normalize=normalize,
        rescale=rescale,
        lambda_=0.5,
    )
    case = Case(operator, base, *tuned)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-5, atol=1e-5)
