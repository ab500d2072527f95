"""RAM+: average what several models changed, strengthen what only one did."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.ramplus_tl import RamplusTl
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], **parameters: Any) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    zeros = [0.0] * len(task_vectors[0])
    return Case(RamplusTl(**parameters), zeros, *task_vectors).merged().tolist()


def test_what_is_a_models_own_is_strengthened_by_its_share_of_overlap() -> None:
    # the first shares 1 and has 4 alone: 1 + 0.5 * 1/4; the second shares 1 and has 1: alpha
    first, second = [2.0, 2.0, 2.0, 2.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    merged = delta(first, second, r=0.5, alpha=0.75)
    assert merged == pytest.approx([3.0, 2.25, 2.25, 2.25, 2.25, 2 * (1 + 0.5 * 0.75)])


def test_without_overlap_nothing_is_strengthened() -> None:
    assert delta([3.0, 0.0], [0.0, 5.0]) == [3.0, 5.0]


def test_where_all_overlaps_it_is_the_mean() -> None:
    assert delta([3.0, 1.0], [1.0, 5.0]) == [2.0, 3.0]


def test_changes_up_to_epsilon_are_not_counted() -> None:
    # each has one alone, and one that is shared only if 0.5 counted
    assert delta([2.0, 0.5], [0.0, 4.0], epsilon=0.5, r=1.0) == [2.0, 4.0]
    assert delta([2.0, 0.5], [0.0, 4.0], epsilon=0.1, r=1.0, alpha=1.0) == [4.0, 2.25]


def test_a_negative_r_weakens() -> None:
    assert delta([2.0, 1.0], [0.0, 3.0], r=-0.5, alpha=1.0) == [1.0, 2.0]


def test_counts_are_of_the_whole_tensor() -> None:
    n = 2 * CELL + 10  # the first has all, the second the first CELL: 1 + 0.1 CELL / (CELL + 10)
    second = torch.zeros(n)
    second[:CELL] = 3.0
    merged = Case(RamplusTl(alpha=1.0), torch.zeros(n), torch.ones(n), second).merged()
    expected = torch.full((n,), 1 + 0.1 * CELL / (CELL + 10))
    expected[:CELL] = 2.0
    torch.testing.assert_close(merged, expected)


def test_what_nobody_changed_comes_out_as_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 0.1, -3.0])
    merged = Case(RamplusTl(), base, base + 1e-6, base - 1e-6).values()
    assert torch.equal(merged.view(torch.int32), base.view(torch.int32))


def test_one_model_is_copied_where_each_change_counts() -> None:
    assert RamplusTl(epsilon=0.0).copies(1, "w", NOWHERE) == 0
    assert RamplusTl().copies(1, "w", NOWHERE) is None


@pytest.mark.parametrize("epsilon", [1e-5, 1.0])
@pytest.mark.parametrize("k", [2, 3])
def test_blocks_merge_to_the_float64_reference(epsilon: float, k: int) -> None:
    base, *tuned = vectors(k, 2 * CELL + 100)
    case = Case(RamplusTl(epsilon=epsilon, alpha=3.0), base, *tuned)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-6, atol=1e-6)
