"""Model Breadcrumbs: drop the largest and the smallest entries, add up what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.breadcrumbs import Breadcrumbs
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], **parameters: Any) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    for name, default in {"weight": 1.0, "density": 0.4, "gamma": 0.0}.items():
        value = parameters.setdefault(name, default)
        if isinstance(value, float):
            parameters[name] = (value,) * len(task_vectors)
    zeros = [0.0] * len(task_vectors[0])
    return Case(Breadcrumbs.model_validate(parameters), zeros, *task_vectors).merged().tolist()


FIVE = [5.0, -4.0, 3.0, -2.0, 1.0]


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.4, 0.2, [0.0, -4.0, 3.0, 0.0, 0.0]),  # 1 goes at the top, 2 stay
        (0.4, 0.39, [0.0, -4.0, 3.0, 0.0, 0.0]),  # 1.95 is cut to 1
        (0.4, 0.0, [5.0, -4.0, 0.0, 0.0, 0.0]),
        (0.8, 0.2, [0.0, -4.0, 3.0, -2.0, 1.0]),
        (0.8, 0.6, [0.0, -4.0, 3.0, -2.0, 1.0]),  # 4 stay, so 1 goes, not 3
        (0.4, 1.0, [0.0, 0.0, 0.0, -2.0, 1.0]),
        (0.19, 0.2, [0.0, 0.0, 0.0, 0.0, 0.0]),  # 0.95 is cut to 0
        (0.0, 0.2, [0.0, 0.0, 0.0, 0.0, 0.0]),
        (1.0, 0.2, FIVE),  # as in mergekit: nothing goes, not even at the top
    ],
)
def test_a_band_of_magnitudes_is_kept(density: float, gamma: float, kept: list[float]) -> None:
    assert delta(FIVE, density=density, gamma=gamma) == kept


def test_of_equal_magnitudes_the_first_rank_as_the_larger() -> None:
    # ranks of the ones: 1st, 2nd, 3rd, 5th; the 2 is 0th. One goes at the top, three stay.
    assert delta([1.0, -1.0, 2.0, 1.0, -1.0], density=0.6, gamma=0.2) == [1.0, -1.0, 0.0, 1.0, 0.0]
    # of four ones the first goes and the next two stay
    assert delta([1.0, -1.0, 1.0, -1.0], density=0.5, gamma=0.25) == [0.0, -1.0, 1.0, 0.0]


def test_equal_magnitudes_are_told_apart_across_cells() -> None:
    n = 3 * CELL + 10
    operator = Breadcrumbs(weight=(1.0,), density=(0.5,), gamma=(0.4,))
    merged = Case(operator, torch.zeros(n), -torch.ones(n)).merged()
    large, kept = int(0.4 * n), int(0.5 * n)
    assert CELL < large < 2 * CELL < large + kept
    expected = torch.zeros(n)
    expected[large : large + kept] = -1.0
    assert torch.equal(merged, expected)


def test_each_model_has_its_own_band() -> None:
    # (3) of the first and (4, 3) of the second
    merged = delta([5.0, 3.0, 1.0], [4.0, 3.0, 2.0], density=(0.34, 0.67), gamma=(0.34, 0.0))
    assert merged == [4.0, 6.0, 0.0]


def test_task_vectors_are_added_with_their_weights_and_lambda() -> None:
    # 0.5 (2 (5, 0) - (0, 3))
    merged = delta([5.0, 1.0], [2.0, 3.0], weight=(2.0, -1.0), density=0.5, **{"lambda": 0.5})
    assert merged == [5.0, -1.5]


def test_normalised_the_sum_is_divided_by_all_weights() -> None:
    # (1 (5, 0) + 3 (0, 3)) / 4
    merged = delta([5.0, 1.0], [2.0, 3.0], weight=(1.0, 3.0), density=0.5, normalize=True)
    assert merged == [1.25, 2.25]


def test_rescaling_restores_the_norm_of_each_task_vector() -> None:
    # |d| = 15 against |-4| + |3| = 7; nothing of a delta of zeros
    merged = delta(FIVE, density=0.4, gamma=0.2, rescale=True)
    assert merged == pytest.approx([0.0, -60 / 7, 45 / 7, 0.0, 0.0])
    assert delta([0.0, 0.0], density=0.5, rescale=True) == [0.0, 0.0]


def test_what_is_outside_the_band_comes_out_as_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 0.1, 1e-30, -7.0])
    model = base + torch.tensor([9.0, 1.0, 0.5, 0.1])
    operator = Breadcrumbs(weight=(1.0,), density=(0.25,), gamma=(0.25,))
    merged = Case(operator, base, model).values()
    assert torch.equal(merged[[0, 2, 3]].view(torch.int32), base[[0, 2, 3]].view(torch.int32))
    assert float(merged[1]) != float(base[1])


def test_shares_outside_0_to_1_are_refused() -> None:
    for given in ({"density": (1.1,)}, {"gamma": (-0.1,)}):
        with pytest.raises(ValidationError):
            Breadcrumbs.model_validate({"weight": (1.0,), "density": (0.5,), **given})


def test_a_model_that_alone_is_heard_is_copied_unless_entries_go() -> None:
    whole = Breadcrumbs(weight=(0.0, 1.0), density=(1.0, 1.0))
    assert whole.copies(2, "w", NOWHERE) == 1
    assert whole.model_copy(update={"density": (1.0, 0.5)}).copies(2, "w", NOWHERE) is None
    assert whole.model_copy(update={"weight": (0.0, 0.0)}).copies(2, "w", NOWHERE) == -1


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_merge_to_the_float64_reference(rescale: bool, dtype: torch.dtype) -> None:
    # on a grid of 4096 steps, so that many magnitudes stand equal at both edges
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = Breadcrumbs(
        weight=(1.0, 0.5, 0.25), density=(0.2, 0.5, 1.0), gamma=(0.1, 0.0, 0.3), rescale=rescale
    )
    case = Case(operator, base, *tuned, dtype=dtype)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-5, atol=1e-5)
