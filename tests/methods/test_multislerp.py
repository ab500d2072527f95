"""Multi-SLERP: the weighted mean of directions, times the weighted mean of norms."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from pydantic import ValidationError

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.multislerp import Multislerp
from tests.merging import Case, vectors

NO_BASE: list[float] = []


def test_two_models_at_a_right_angle_meet_half_way_at_their_mean_norm() -> None:
    # the direction is (1, 1) / sqrt(2), the mean of the norms 2 and 4 is 3
    values = Case(Multislerp(weight=(1, 1)), NO_BASE, [2.0, 0.0], [0.0, 4.0]).values()
    assert values.tolist() == pytest.approx([3 / sqrt(2), 3 / sqrt(2)])


def test_weights_turn_the_direction_and_weigh_the_norms() -> None:
    # directions (1, 0) and (0, 1) by 3/5 and 4/5 give a unit vector; norms 3/5 * 5 + 4/5 * 10 = 11
    operator = Multislerp(weight=(0.6, 0.8), normalize_weights=False)
    values = Case(operator, NO_BASE, [5.0, 0.0], [0.0, 10.0]).values()
    assert values.tolist() == pytest.approx([6.6, 8.8])


def test_normalized_weights_are_divided_by_their_sum() -> None:
    case = [NO_BASE, [5.0, 0.0], [0.0, 10.0]]
    plain = Case(Multislerp(weight=(0.25, 0.75), normalize_weights=False), *case).values()
    assert Case(Multislerp(weight=(1, 3)), *case).values().tolist() == pytest.approx(plain.tolist())


def test_with_a_base_it_is_the_task_vectors_that_are_averaged() -> None:
    values = Case(Multislerp(weight=(1, 1)), [1.0, 1.0], [3.0, 1.0], [1.0, 5.0]).values()
    assert values.tolist() == pytest.approx([1 + 3 / sqrt(2), 1 + 3 / sqrt(2)])


def test_three_models_of_which_one_did_not_move() -> None:
    # it has no direction but a norm of 0: (1, 1) / sqrt(2) times (2 + 4 + 0) / 3
    operator = Multislerp(weight=(1, 1, 1))
    values = Case(operator, [0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 0.0]).values()
    assert values.tolist() == pytest.approx([sqrt(2), sqrt(2)])


@pytest.mark.parametrize("k", [2, 3])
def test_a_tensor_that_nobody_moved_comes_out_as_the_base_bit_for_bit(k: int) -> None:
    base = torch.tensor([-0.0, 0.1, -3.0])
    values = Case(Multislerp(weight=(0.3,) * k), base, *([base] * k)).values()
    assert torch.equal(values.view(torch.int32), base.view(torch.int32))


def test_directions_that_cancel_leave_the_weighted_sum() -> None:
    # 1/2 (2, 0) + 1/2 (-4, 0)
    values = Case(Multislerp(weight=(1, 1)), NO_BASE, [2.0, 0.0], [-4.0, 0.0]).values()
    assert values.tolist() == [-1.0, 0.0]
    three = ([1.0, 0.0], [-0.5, sqrt(0.75)], [-1.0, -sqrt(3.0)])  # 120 degrees apart
    values = Case(Multislerp(weight=(1, 1, 1), eps=1e-6), NO_BASE, *three).values()
    assert values.tolist() == pytest.approx([-0.5 / 3, -sqrt(0.75) / 3])


@pytest.mark.parametrize("k", [2, 3])
def test_equal_models_come_out_bit_for_bit(k: int) -> None:
    same = torch.tensor([1.5, -0.0, 0.0, -2.3])
    values = Case(Multislerp(weight=(0.3, 0.9, 0.5)[:k]), NO_BASE, *([same] * k)).values()
    assert torch.equal(values.view(torch.int32), same.view(torch.int32))


def test_weights_that_cancel_are_refused() -> None:
    with pytest.raises(ValidationError, match="sum to zero"):
        Multislerp(weight=(0.5, -0.5))


def test_the_only_model_that_is_heard_is_copied() -> None:
    assert Multislerp(weight=(0.3,)).copies(1, "w", NOWHERE) == 0
    assert Multislerp(weight=(0.0, 0.3)).copies(2, "w", NOWHERE) == 1
    assert Multislerp(weight=(0.0, 0.3), normalize_weights=False).copies(2, "w", NOWHERE) is None
    assert Multislerp(weight=(0.2, 0.3)).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_blocks_merge_to_the_float64_reference(based: bool, normalize: bool) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = Multislerp(weight=(0.5, 0.9, -0.2), normalize_weights=normalize)
    case = Case(operator, base if based else NO_BASE, *tuned)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=0, atol=4e-6)
