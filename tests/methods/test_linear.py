"""Linear merging: theta = sum_i w_i theta_i, divided by sum_i w_i where asked."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.linear import Linear
from tests.merging import Case, vectors

NO_BASE: list[float] = []


def test_the_average_is_weighted() -> None:
    # (1 * 0 + 3 * 8) / 4 = 6 and (1 * 4 + 3 * -4) / 4 = -2
    case = Case(Linear(weight=(1.0, 3.0)), NO_BASE, [0.0, 4.0], [8.0, -4.0])
    assert case.values().tolist() == [6.0, -2.0]


def test_without_normalising_it_is_a_sum() -> None:
    # 0.5 * 2 + 2 * 3 = 7
    case = Case(Linear(weight=(0.5, 2.0), normalize=False), NO_BASE, [2.0], [3.0])
    assert case.values().tolist() == [7.0]


def test_a_negative_weight_leads_away_from_a_model() -> None:
    # (2 * 3 - 1 * 1) / 1 = 5
    assert Case(Linear(weight=(2.0, -1.0)), NO_BASE, [3.0], [1.0]).values().tolist() == [5.0]


def test_three_models_are_all_heard() -> None:
    # (1 * 1 + 1 * 2 + 2 * 4) / 4 = 2.75
    case = Case(Linear(weight=(1.0, 1.0, 2.0)), NO_BASE, [1.0], [2.0], [4.0])
    assert case.values().tolist() == [2.75]


@pytest.mark.parametrize("weight", [(1.0, -1.0), (0.1, 0.2, -0.3), (0.0,)])
def test_weights_that_cancel_cannot_be_normalised(weight: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="sum to zero"):
        Linear(weight=weight)
    assert Linear(weight=weight, normalize=False).weight == weight


@pytest.mark.parametrize("weight", [(0.3, 0.7), (1.0, 3.0), (2.0, -0.5)])
def test_equal_models_come_out_bit_for_bit(weight: tuple[float, ...]) -> None:
    model = torch.tensor([0.1, -0.0, 0.0, 1e-40, 3e37])
    values = Case(Linear(weight=weight), NO_BASE, model, model).values()
    assert values.view(torch.int32).tolist() == model.view(torch.int32).tolist()


def test_a_model_that_alone_is_heard_is_copied_where_its_share_is_1() -> None:
    assert Linear(weight=(0.0, 0.4)).copies(2, "w", NOWHERE) == 1
    assert Linear(weight=(1.0, 0.0), normalize=False).copies(2, "w", NOWHERE) == 0
    assert Linear(weight=(0.5, 0.0), normalize=False).copies(2, "w", NOWHERE) is None
    assert Linear(weight=(0.5, 0.5)).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("normalize", [True, False])
def test_blocks_merge_to_the_float64_reference(normalize: bool) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    case = Case(Linear(weight=(0.7, 0.9, -0.4), normalize=normalize), base, *tuned)
    torch.testing.assert_close(case.values().double(), case.reference(), rtol=0, atol=2e-6)
