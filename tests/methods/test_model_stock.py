"""Model Stock: t = N cos / (1 + (N - 1) cos) of the mean task vector."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from mergekit_ft.contract import CELL
from mergekit_ft.methods.model_stock import ModelStock
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], shape: tuple[int, ...] | None = None) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros, by tensor."""
    zeros = [0.0] * len(task_vectors[0])
    return Case(ModelStock(), zeros, *task_vectors, shape=shape).merged().tolist()


def test_two_models_60_degrees_apart_go_two_thirds_of_the_way() -> None:
    # t = 2 * 1/2 / (1 + 1/2) = 2/3, of the mean (3/4, sqrt(3)/4)
    assert delta([1.0, 0.0], [0.5, sqrt(0.75)]) == pytest.approx([0.5, sqrt(3) / 6])


def test_three_models_take_the_mean_cosine_of_all_pairs() -> None:
    # pairs 1, 0, 0: cos = 1/3, t = 1 / (1 + 2/3) = 3/5, of the mean (2/3, 1/3)
    assert delta([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]) == pytest.approx([0.4, 0.2])


def test_models_at_right_angles_leave_the_base() -> None:
    assert delta([1.0, 0.0], [0.0, 5.0]) == [0.0, 0.0]


def test_opposite_models_make_the_denominator_vanish_and_leave_the_base() -> None:
    # 1 + cos = 0
    assert delta([1.0, 1.0], [-2.0, -2.0]) == [0.0, 0.0]


def test_short_vectors_count_as_nearer_to_a_right_angle() -> None:
    # |d|^2 = 5e-7 is divided by 1e-6: cos = 1/2, t = 2/3
    short = [sqrt(5e-7), 0.0]
    assert delta(short, short) == pytest.approx([short[0] * 2 / 3, 0.0])


def test_each_row_has_a_ratio_of_its_own() -> None:
    one, other = [1.0, 0.0, 2.0, 0.0], [0.5, sqrt(0.75), 0.0, 3.0]
    case = Case(ModelStock(filter_wise=True), [0.0] * 4, one, other, shape=(2, 2))
    assert case.merged().tolist() == pytest.approx([0.5, sqrt(3) / 6, 0.0, 0.0])


def test_a_tensor_of_one_axis_is_one_row() -> None:
    base, *tuned = vectors(2, CELL + 100)
    by_row = Case(ModelStock(filter_wise=True), base, *tuned).merged()
    torch.testing.assert_close(by_row, Case(ModelStock(), base, *tuned).merged())


@pytest.mark.parametrize("filter_wise", [False, True])
def test_models_equal_to_the_base_come_out_bit_for_bit(filter_wise: bool) -> None:
    same = torch.tensor([1.5, -0.0, 0.0, -2.3])
    operator = ModelStock(filter_wise=filter_wise)
    values = Case(operator, same, same, same, same, shape=(2, 2)).values()
    assert torch.equal(values.view(torch.int32), same.view(torch.int32))


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_blocks_merge_to_the_float64_reference(k: int, filter_wise: bool) -> None:
    shape = (2, CELL // 300, 300)
    base, *tuned = vectors(k, 2 * (CELL // 300) * 300)
    near = [tuned[0] + x / 2 for x in tuned]
    for models in (tuned, near):
        case = Case(ModelStock(filter_wise=filter_wise), base, *models, shape=shape)
        torch.testing.assert_close(case.merged().double(), case.reference(), rtol=0, atol=4e-6)
