"""NearSwap: a step of at most t from the base towards another model."""

from __future__ import annotations

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.nearswap import Nearswap
from tests.merging import Case, vectors


def nearswap(t: float, a: list[float], b: list[float]) -> list[float]:
    return Case(Nearswap(t=t), a, b).values().tolist()


def test_an_element_moves_by_t_or_all_the_way() -> None:
    assert nearswap(0.5, [1.0, 1.0, 1.0, 1.0], [1.25, 3.0, -3.0, 1.5]) == [1.25, 1.5, 0.5, 1.5]


def test_what_is_nearer_than_a_millionth_moves_by_its_share() -> None:
    # w = t / 1e-6 = 1/4 up to a distance of 1e-6, beyond it the step is t
    found = nearswap(2.5e-7, [0.0, 0.0], [4e-7, 1.0])
    assert found == pytest.approx([1e-7, 2.5e-7])


def test_where_the_step_reaches_the_other_model_its_own_bits_come_out() -> None:
    a, b = torch.tensor([0.1, 1e8, -0.0, 0.0]), torch.tensor([0.3, 1e8 + 8, 0.0, -0.0])
    values = Case(Nearswap(t=10.0), a, b).values()
    assert torch.equal(values.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("t", [1e-7, 1e-3, 2.0])
def test_equal_models_come_out_bit_for_bit(t: float) -> None:
    same = torch.tensor([1.5, -0.0, 0.0, -2.3, 1e-40])
    values = Case(Nearswap(t=t), same, same).values()
    assert torch.equal(values.view(torch.int32), same.view(torch.int32))


def test_without_a_step_the_base_is_copied() -> None:
    assert [Nearswap(t=t).copies(1, "w", NOWHERE) for t in (0.0, -1.0, 1e-9)] == [-1, -1, None]
    assert nearswap(-1.0, [1.0, 2.0], [2.0, -5.0]) == [1.0, 2.0]


@pytest.mark.parametrize("t", [1e-7, 0.25, 3.0])
def test_blocks_merge_to_the_float64_reference(t: float) -> None:
    base, tuned = vectors(1, CELL + 100)
    case = Case(Nearswap(t=t), base, tuned)
    torch.testing.assert_close(case.values().double(), case.reference(), rtol=0, atol=1e-6)
