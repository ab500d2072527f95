"""Consensus merging: what at least k tasks need of their sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_ft.contract import NOWHERE
from mergekit_ft.methods.consensus import Consensus
from tests.merging import Case, vectors

#          all need it | two of three | one alone | opposite, nobody's
FIRST = [1.0, 3.0, 4.0, 0.1]
SECOND = [1.0, 3.0, 0.1, -2.0]
THIRD = [1.0, 0.0, 0.1, 2.0]


def operator(**parameters: Any) -> Consensus:
    return Consensus.model_validate({"threshold": (0.4,) * 3, **parameters})


def delta(**parameters: Any) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    return Case(operator(**parameters), [0.0] * 4, FIRST, SECOND, THIRD).merged().tolist()


def test_entries_that_fewer_tasks_need_are_taken_out() -> None:
    # sums 3, 6, 4.2, 0.1; |d_t| > 0.4 |d - d_t|:
    #   1 > 0.4 * 2 for all three; 3 > 0.4 * 3 for two, 0 > 0.4 * 6 not;
    #   4 > 0.4 * 0.2 for the first, 0.1 > 0.4 * 4.1 for none else;
    #   0.1 > 0 | 2 > 0.4 * 2.1 | 2 > 0.4 * 1.9: all three
    assert delta(k=3) == pytest.approx([3.0, 0.0, 0.0, 0.1])
    assert delta(k=2) == pytest.approx([3.0, 6.0, 0.0, 0.1])
    assert delta(k=1) == pytest.approx([3.0, 6.0, 4.2, 0.1])
    assert delta(k=0) == pytest.approx([3.0, 6.0, 4.2, 0.1])


def test_each_model_has_its_own_threshold() -> None:
    # 3 > t * 3 only below 1: the second no longer needs the second entry
    assert delta(k=2, threshold=(0.4, 1.0, 0.4)) == pytest.approx([3.0, 0.0, 0.0, 0.1])


def test_lambda_scales_what_is_left() -> None:
    assert delta(k=3, **{"lambda": 0.5}) == pytest.approx([1.5, 0.0, 0.0, 0.05])


def test_the_merge_may_be_that_of_ties() -> None:
    # signs +, +, +, + (0.1 - 2 + 2 > 0): sums of those that agree 3, 6, 4.2, 2.1
    #   last: 0.1 > 0.4 * 2 not, 2 > 0.4 * 4.1, 2 > 0.4 * 0.1: two need it
    made = delta(k=2, merge="ties", density=1.0)
    assert made == pytest.approx([3.0, 6.0, 0.0, 2.1])
    # of 4 entries 2 are kept: 3, 4 | 3, -2 | 1, 2: total 1, 6, 4, 0: the sign of a zero is +
    #   sums 1, 6, 4, 2; needs |d_t| > 0.4 |d - d_t|:
    #   first 1 > 0: all | 3 > 1.2 twice | 4 > 0 alone | 0.1 > 0.76 not, 2 > 0.4 * 4, 2 > 0: two
    trimmed = delta(k=2, merge="ties", density=0.5)
    assert trimmed == pytest.approx([1.0, 6.0, 0.0, 2.0])


def test_asking_for_more_tasks_than_there_are_gives_the_base() -> None:
    assert operator(k=4).copies(3, "w", NOWHERE) == -1
    assert Consensus(threshold=(0.4,), k=1).copies(1, "w", NOWHERE) == 0
    assert Consensus(threshold=(0.4,), k=2).copies(1, "w", NOWHERE) == -1


@pytest.mark.parametrize("more", [{"density": 0.2}, {"scope": "model"}])
def test_a_trim_without_ties_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="they need merge: ties"):
        operator(**more)


def test_ties_trims_to_a_fifth_unless_told_otherwise() -> None:
    # of 5 entries one is kept: 5 and -4; sums 0, 0, 0, -4, 5; the threshold 0 asks for any change
    first, second = [1.0, 2.0, 3.0, 0.0, 5.0], [1.0, 2.0, 3.0, -4.0, 1.0]
    made = Case(operator(k=1, merge="ties", threshold=(0.0,) * 2), [0.0] * 5, first, second)
    assert made.merged().tolist() == [0.0, 0.0, 0.0, -4.0, 5.0]


def test_two_tasks_and_zeros() -> None:
    # with two tasks |d_1| > l |d_2| and the other way round: only entries of like size are left
    first, second = [1.0, 1.0, 1.0, 0.0, -1.0], [1.0, 3.0, 2.0, 0.0, 1.0]
    made = Case(operator(k=2, threshold=(0.4,) * 2), [0.0] * 5, first, second).merged()
    assert made.tolist() == [2.0, 0.0, 3.0, 0.0, 0.0]  # 1 > 0.4 * 3 not; 1 > 0.4 * 2; 1 - 1


@pytest.mark.parametrize("more", [{}, {"merge": "ties"}, {"merge": "ties", "density": 0.01}])
def test_it_agrees_with_the_plain_form(more: dict[str, Any]) -> None:
    case = Case(operator(k=2, **more), *vectors(3, 150_000))
    made, plain = case.merged(), case.reference()
    beyond = (made.double() - plain).abs() > 1e-6 * plain.abs().clamp(min=1e-3)
    assert int(beyond.sum()) <= 2  # at a threshold, where float32 and float64 may decide otherwise
    assert torch.count_nonzero(made) > 0
