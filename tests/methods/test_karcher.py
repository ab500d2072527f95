"""Karcher mean: the point of the sphere nearest to all directions, times the mean norm."""

from __future__ import annotations

from math import atan2, cos, radians, sin, sqrt

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.karcher import Karcher
from tests.merging import Case, vectors

NO_BASE: list[float] = []


def mean(*models: list[float], **parameters: float) -> list[float]:
    return Case(Karcher(**parameters), NO_BASE, *models).values().tolist()


def test_two_models_meet_half_way_along_the_arc_at_their_mean_norm() -> None:
    assert mean([2.0, 0.0], [0.0, 4.0]) == pytest.approx([3 / sqrt(2), 3 / sqrt(2)])


def test_on_a_circle_the_mean_direction_is_the_mean_of_the_angles() -> None:
    # 0, 30 and 90 degrees: 40; the mean of the vectors themselves points elsewhere
    angles = [0.0, 30.0, 90.0]
    models = [[cos(radians(a)), sin(radians(a))] for a in angles]
    assert mean(*models) == pytest.approx([cos(radians(40)), sin(radians(40))], abs=1e-6)
    chord = atan2(sum(m[1] for m in models), sum(m[0] for m in models))
    (x, y) = mean(*models, max_iter=0)
    assert atan2(y, x) == pytest.approx(chord)
    assert abs(chord - radians(40)) > 0.01


def test_three_axes_meet_at_the_diagonal() -> None:
    found = mean([3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0])
    assert found == pytest.approx([sqrt(3)] * 3)


def test_a_model_of_zeros_has_no_direction_but_counts_for_the_mean_norm() -> None:
    assert mean([3.0, 0.0], [0.0, 0.0]) == pytest.approx([1.5, 0.0])


def test_models_too_short_for_a_direction_are_averaged() -> None:
    assert mean([2e-6, 0.0], [0.0, -4e-6]) == pytest.approx([1e-6, -2e-6])
    assert mean([0.0, 0.0], [0.0, 0.0]) == [0.0, 0.0]


def test_opposite_models_stay_where_the_first_one_points() -> None:
    assert mean([1.0, 0.0], [-3.0, 0.0]) == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("model", [[1.5, -0.0, 0.0, -2.3], [-0.0, 0.0], [1e-12, -0.0]])
def test_equal_models_come_out_bit_for_bit(model: list[float], k: int) -> None:
    same = torch.tensor(model)
    values = Case(Karcher(), NO_BASE, *([same] * k)).values()
    assert torch.equal(values.view(torch.int32), same.view(torch.int32))


def test_one_model_is_copied() -> None:
    assert [Karcher().copies(k, "w", NOWHERE) for k in (1, 2)] == [0, None]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("tol", [1e-5, 0.0])
def test_blocks_merge_to_the_float64_reference(k: int, tol: float) -> None:
    _, *tuned = vectors(k, 2 * CELL + 100)
    near = [tuned[0] + x / 512 for x in tuned]
    for models in (tuned, near):
        case = Case(Karcher(tol=tol), NO_BASE, *models)
        torch.testing.assert_close(case.values().double(), case.reference(), rtol=0, atol=4e-6)
