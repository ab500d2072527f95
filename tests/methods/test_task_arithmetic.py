"""Task arithmetic: theta_0 + lambda sum_i w_i (theta_i - theta_0)."""

from __future__ import annotations

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.task_arithmetic import TaskArithmetic
from tests.merging import Case, vectors

BASE = [10.0, 20.0]
MATHS, CHAT = [11.0, 18.0], [13.0, 24.0]  # task vectors (1, -2) and (3, 4)


def merge(**parameters: object) -> list[float]:
    return Case(TaskArithmetic.model_validate(parameters), BASE, MATHS, CHAT).values().tolist()


def test_task_vectors_are_added_with_their_weights() -> None:
    # 0.5 (1, -2) + 0.25 (3, 4) = (1.25, 0)
    assert merge(weight=(0.5, 0.25)) == [11.25, 20.0]


def test_a_negated_task_vector_is_forgotten() -> None:
    # (1, -2) - (3, 4) = (-2, -6)
    assert merge(weight=(1.0, -1.0)) == [8.0, 14.0]


def test_lambda_scales_the_merged_delta() -> None:
    # 0.3 ((1, -2) + (3, 4)) = (1.2, 0.6)
    assert merge(weight=(1.0, 1.0), **{"lambda": 0.3}) == pytest.approx([11.2, 20.6])


def test_normalised_the_sum_is_divided_by_the_weights() -> None:
    # (2 (1, -2) + 2 (3, 4)) / 4 = (2, 1)
    assert merge(weight=(2.0, 2.0), normalize=True) == [12.0, 21.0]


def test_weights_that_cancel_are_divided_by_1() -> None:
    # as mergekit: |sum w| < 1e-8 counts as 1
    assert merge(weight=(1.0, -1.0), normalize=True) == [8.0, 14.0]


def test_words_that_have_no_effect_in_mergekit_either_say_so() -> None:
    assert set(TaskArithmetic.without_effect) == {"density", "rescale"}
    assert not set(TaskArithmetic.without_effect) & set(TaskArithmetic.model_fields)


def test_int8_mask_changes_nothing() -> None:
    assert merge(weight=(0.5, 0.25), int8_mask=True) == merge(weight=(0.5, 0.25))


def test_a_model_that_alone_is_heard_is_copied_where_its_factor_is_1() -> None:
    def copies(*weight: float, **more: object) -> int | None:
        operator = TaskArithmetic.model_validate({"weight": weight, **more})
        return operator.copies(len(weight), "w", NOWHERE)

    assert copies(0.0, 1.0) == 1
    assert copies(0.0, 0.5) is None
    assert copies(0.5, 0.0, **{"lambda": 2.0}) == 0
    assert copies(0.3, 0.0, normalize=True) == 0
    assert copies(1e-9, normalize=True) is None  # so small a sum is taken for 1, not divided by
    assert copies(1.0, 1.0) is None


def test_where_nothing_is_heard_the_base_is_copied() -> None:
    assert TaskArithmetic(weight=(0.0, 0.0)).copies(2, "w", NOWHERE) == -1
    silent = TaskArithmetic.model_validate({"weight": (1.0,), "lambda": 0.0})
    assert silent.copies(1, "w", NOWHERE) == -1


@pytest.mark.parametrize("normalize", [True, False])
def test_blocks_merge_to_the_float64_reference(normalize: bool) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = TaskArithmetic(weight=(0.7, 0.9, -0.4), normalize=normalize, lambda_=0.9)
    case = Case(operator, base, *tuned)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=0, atol=4e-6)
