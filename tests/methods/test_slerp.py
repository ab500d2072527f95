"""SLERP: sin((1-t) phi) / sin(phi) a + sin(t phi) / sin(phi) b, phi the angle between a and b."""

from __future__ import annotations

from math import cos, radians, sin, sqrt

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.slerp import Slerp
from tests.merging import Case, vectors


def slerp(t: float, a: list[float], b: list[float]) -> list[float]:
    return Case(Slerp(t=t), a, b).values().tolist()


def test_half_way_between_right_angles_both_weigh_the_same() -> None:
    # sin 45 / sin 90 = sqrt(1/2) for both
    assert slerp(0.5, [1.0, 0.0], [0.0, 1.0]) == pytest.approx([sqrt(0.5), sqrt(0.5)])


def test_a_third_of_the_way_along_a_right_angle() -> None:
    # sin 60 = sqrt(3)/2 for a, sin 30 = 1/2 for b
    assert slerp(1 / 3, [1.0, 0.0], [0.0, 1.0]) == pytest.approx([sqrt(3) / 2, 0.5])


def test_the_unnormalised_tensors_are_blended() -> None:
    # the same weights on vectors of length 2 and 10
    assert slerp(1 / 3, [2.0, 0.0], [0.0, 10.0]) == pytest.approx([sqrt(3), 5.0])


def test_an_angle_of_60_degrees() -> None:
    # sin 30 / sin 60 = 1 / sqrt(3) for both: (1 + 1/2, sqrt(3)/2) / sqrt(3) = (sqrt(3)/2, 1/2)
    assert slerp(0.5, [1.0, 0.0], [0.5, sqrt(3) / 2]) == pytest.approx([sqrt(3) / 2, 0.5])


@pytest.mark.parametrize(
    ("t", "expected"),
    # sin(-45) and sin 135 for t = 1.5; sin 135 and sin(-45) for t = -0.5
    [(1.5, [-sqrt(0.5), sqrt(0.5)]), (-0.5, [sqrt(0.5), -sqrt(0.5)])],
)
def test_t_may_lie_outside_the_arc(t: float, expected: list[float]) -> None:
    assert slerp(t, [1.0, 0.0], [0.0, 1.0]) == pytest.approx(expected)


def test_nearly_parallel_vectors_are_joined_by_a_line() -> None:
    # cos(phi) = 1 / sqrt(1.0001) > 0.9995: 3/4 (1, 0) + 1/4 (1, 0.01)
    assert slerp(0.25, [1.0, 0.0], [1.0, 0.01]) == pytest.approx([1.0, 0.0025], abs=1e-7)


@pytest.mark.parametrize(("degrees", "straight"), [(1.8, True), (1.82, False)])
def test_the_arc_becomes_a_line_at_a_cosine_of_9995_in_10000(
    degrees: float, straight: bool
) -> None:
    # cos 1.8 = 0.999507 and cos 1.82 = 0.999496
    a, b = [1.0, 0.0], [cos(radians(degrees)), sin(radians(degrees))]
    assert Case(Slerp(t=0.5), a, b).finding().straight is straight


def test_opposite_vectors_are_joined_by_a_line() -> None:
    # cos = -1: 3/4 (1, 2) + 1/4 (-3, -6) = 0
    assert slerp(0.25, [1.0, 2.0], [-3.0, -6.0]) == [0.0, 0.0]


def test_a_tensor_of_zeros_stands_at_a_right_angle_to_any_other() -> None:
    # its norm is taken for 1, so cos = 0: sin 60 (2, 0) = (sqrt(3), 0)
    assert slerp(1 / 3, [2.0, 0.0], [0.0, 0.0]) == pytest.approx([sqrt(3), 0.0])


@pytest.mark.parametrize("t", [-0.5, 0.3, 0.5, 0.7, 1.5])
@pytest.mark.parametrize(
    "model", [[1.5, -0.0, 0.0, -2.0], [-0.0, 0.0, -0.0], [1e-12, 1e-12], [1e-40, -0.0]]
)
def test_equal_models_come_out_bit_for_bit(model: list[float], t: float) -> None:
    same = torch.tensor(model)
    values = Case(Slerp(t=t), same, same).values()
    assert values.view(torch.int32).tolist() == same.view(torch.int32).tolist()


def test_the_ends_of_the_arc_are_copied() -> None:
    assert [Slerp(t=t).copies(1, "w", NOWHERE) for t in (0.0, 1.0, 0.5)] == [-1, 0, None]


@pytest.mark.parametrize("t", [0.25, 0.5, 1.25])
def test_blocks_merge_to_the_float64_reference(t: float) -> None:
    base, tuned = vectors(1, 2 * CELL + 100)
    case = Case(Slerp(t=t), base, tuned)
    assert not case.finding().straight
    torch.testing.assert_close(case.values().double(), case.reference(), rtol=0, atol=2e-6)
    line = Case(Slerp(t=t), base, base + tuned / 1024)
    assert line.finding().straight
    torch.testing.assert_close(line.values().double(), line.reference(), rtol=0, atol=2e-6)
