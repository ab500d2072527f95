"""NuSLERP: SLERP with weights, of models or task vectors, of tensors, rows or columns."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE, Grain
from mergekit_ft.methods.nuslerp import Nuslerp
from tests.merging import Case, vectors

NO_BASE: list[float] = []
KINDS = [(True, False), (False, False), (False, True)]  # flatten, row-wise


def nuslerp(first: float, second: float, flatten: bool = True, row_wise: bool = False) -> Nuslerp:
    return Nuslerp(weight=(first, second), nuslerp_flatten=flatten, nuslerp_row_wise=row_wise)


def test_models_at_a_right_angle_are_joined_along_the_arc() -> None:
    # t = 1/3: sin 60 = sqrt(3)/2 and sin 30 = 1/2, of vectors of length 2 and 4
    values = Case(nuslerp(2.0, 1.0), NO_BASE, [2.0, 0.0], [0.0, 4.0]).values()
    assert values.tolist() == pytest.approx([sqrt(3), 2.0])


def test_with_a_base_it_is_the_task_vectors_that_are_joined() -> None:
    # the same two, from a base of (1, 1)
    values = Case(nuslerp(2.0, 1.0), [1.0, 1.0], [3.0, 1.0], [1.0, 5.0]).values()
    assert values.tolist() == pytest.approx([1.0 + sqrt(3), 3.0])


def test_weights_that_cancel_mean_half_way() -> None:
    assert nuslerp(0.5, -0.5).t == nuslerp(0.0, 0.0).t == 0.5


def test_rows_or_columns_are_vectors_of_their_own() -> None:
    # (1, 0) and (0, 1) are at a right angle: sqrt(1/2) of both; (2, 0) and (4, 0) are on a line
    one, other = [[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [4.0, 0.0]]
    a, b = (torch.tensor(rows) for rows in (one, other))
    rows = Case(nuslerp(1, 1, flatten=False), NO_BASE, a, b, shape=(2, 2)).values()
    assert rows.tolist() == pytest.approx([sqrt(0.5), sqrt(0.5), 3.0, 0.0])
    turned = Case(nuslerp(1, 1, False, True), NO_BASE, a.T, b.T, shape=(2, 2)).values()
    assert turned.tolist() == pytest.approx([sqrt(0.5), 3.0, sqrt(0.5), 0.0])


def test_a_tensor_of_one_axis_is_one_vector_each_way() -> None:
    for flatten, row_wise in KINDS:
        case = Case(nuslerp(1, 1, flatten, row_wise), NO_BASE, [1.0, 0.0], [0.0, 1.0])
        assert case.values().tolist() == pytest.approx([sqrt(0.5), sqrt(0.5)])


def test_opposite_vectors_are_joined_by_a_line() -> None:
    for flatten, row_wise in KINDS:
        case = Case(nuslerp(3, 1, flatten, row_wise), NO_BASE, [1.0, 2.0], [-3.0, -6.0])
        assert case.values().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("flatten", "row_wise"), KINDS)
@pytest.mark.parametrize("first", [-0.5, 0.3, 1.5])
@pytest.mark.parametrize("model", [[1.5, -0.0, 0.0, -2.0], [-0.0] * 4, [1e-40, -0.0, 1e-12, 0.0]])
def test_equal_models_come_out_bit_for_bit(
    model: list[float], first: float, flatten: bool, row_wise: bool
) -> None:
    same = torch.tensor(model)
    operator = nuslerp(first, 1.0 - first, flatten, row_wise)
    for base in (NO_BASE, same):
        values = Case(operator, base, same, same, shape=(2, 2)).values()
        assert values.view(torch.int32).tolist() == same.view(torch.int32).tolist()


def test_a_model_that_alone_is_heard_is_copied() -> None:
    ends = [nuslerp(1, 0), nuslerp(0, 0.3), nuslerp(1, 1)]
    assert [operator.copies(2, "w", NOWHERE) for operator in ends] == [0, 1, None]


def test_only_columns_need_the_whole_tensor() -> None:
    grains = [nuslerp(1, 1, *kind).grain for kind in (*KINDS, (True, True))]
    assert grains == [Grain.ELEMENT, Grain.ROW, Grain.TENSOR, Grain.ELEMENT]


@pytest.mark.parametrize(("flatten", "row_wise"), KINDS)
@pytest.mark.parametrize("based", [False, True])
def test_blocks_merge_to_the_float64_reference(flatten: bool, row_wise: bool, based: bool) -> None:
    shape = (2, CELL // 300, 300)
    base, *tuned = vectors(2, 2 * (CELL // 300) * 300)
    operator = nuslerp(0.7, 0.4, flatten, row_wise)
    case = Case(operator, base if based else NO_BASE, *tuned, shape=shape)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-6, atol=4e-6)
