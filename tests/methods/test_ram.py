"""RAM: average what several models changed, keep whole what only one did."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.ram import Ram
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], epsilon: float = 1e-5) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    zeros = [0.0] * len(task_vectors[0])
    return Case(Ram(epsilon=epsilon), zeros, *task_vectors).merged().tolist()


def test_what_one_model_changed_is_kept_whole_and_what_several_did_is_averaged() -> None:
    merged = delta([3.0, 3.0, 3.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, -1.0, 0.0])
    assert merged == [3.0, 2.0, 1.0, 0.0]


def test_changes_up_to_epsilon_count_as_none() -> None:
    # 0.5 is not larger than 0.5: the second model alone; -0.75 is
    assert delta([0.5, -0.75, 0.25], [2.0, 1.75, -0.5], epsilon=0.5) == [2.0, 0.5, 0.0]


def test_without_epsilon_every_change_counts() -> None:
    assert delta([1e-30, 0.0], [0.0, 0.0], epsilon=0.0) == [pytest.approx(1e-30), 0.0]


def test_what_nobody_changed_comes_out_as_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 0.1, -3.0])
    models = [base + 1e-6, base - 1e-6]
    merged = Case(Ram(epsilon=1e-5), base, *models).values()
    assert torch.equal(merged.view(torch.int32), base.view(torch.int32))


def test_a_negative_epsilon_is_refused() -> None:
    with pytest.raises(ValidationError):
        Ram(epsilon=-1e-5)


def test_one_model_is_copied_where_each_change_counts() -> None:
    assert Ram(epsilon=0.0).copies(1, "w", NOWHERE) == 0
    assert Ram().copies(1, "w", NOWHERE) is None
    assert Ram(epsilon=0.0).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1.0])
def test_blocks_merge_to_the_float64_reference(epsilon: float) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    case = Case(Ram(epsilon=epsilon), base, *tuned)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-6, atol=1e-6)
