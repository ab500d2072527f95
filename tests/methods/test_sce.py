"""SCE: keep where models differ most, weigh them by their squares, merge those that agree."""

from __future__ import annotations

import pytest
import torch

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.sce import Sce
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], select_topk: float = 1.0) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    zeros = [0.0] * len(task_vectors[0])
    return Case(Sce(select_topk=select_topk), zeros, *task_vectors).merged().tolist()


def test_models_weigh_as_the_squares_of_their_task_vectors() -> None:
    # squares 1 + 9 = 10 and 4 + 16 = 20: weights 1/3 and 2/3; both agree everywhere
    assert delta([1.0, 3.0], [2.0, 4.0]) == pytest.approx([5 / 3, 11 / 3])


def test_who_disagrees_with_the_sum_is_left_out() -> None:
    # weights as above; 1 - 2 < 0: the second alone; 3 + 4 > 0: both
    assert delta([1.0, 3.0], [-2.0, 4.0]) == pytest.approx([-2.0, 11 / 3])


def test_the_vote_is_not_weighted() -> None:
    # squares 9 + 100 and 4 + 4 + 0: weighted, 3 would outvote the two
    merged = delta([3.0, 10.0], [-2.0, 0.0], [-2.0, 0.0])
    assert merged == pytest.approx([-2.0, 10.0])


def test_an_even_vote_elects_plus_and_zeros_are_not_counted() -> None:
    assert delta([2.0, 0.0], [-2.0, 1.0]) == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize(
    ("select_topk", "kept"),
    [
        (0.75, [True, True, True, False, False]),  # 0.75 of the 4 places that differ
        (0.5, [True, True, False, False, False]),
        (0.49, [True, False, False, False, False]),  # 1.96 is cut to 1
        (0.2, [False] * 5),  # 0.8 is cut to 0
        (0.0, [False] * 5),
    ],
)
def test_the_places_where_models_differ_most_are_kept(select_topk: float, kept: list[bool]) -> None:
    # variances 16, 9, 4, 1, 0; both vectors have one norm wherever they are cut
    first, second = [8.0, 0.0, 5.0, 1.0, 9.0], [0.0, 6.0, 1.0, 3.0, 9.0]
    assert [value != 0 for value in delta(first, second, select_topk=select_topk)] == kept


def test_weights_come_from_what_is_kept() -> None:
    # variances 4, 1: the first place alone, squares 25 and 1: (25 * 5 + 1) / 26
    assert delta([5.0, 4.0], [1.0, 6.0], select_topk=0.5) == pytest.approx([126 / 26, 0.0])


def test_of_equal_variances_the_first_are_kept_across_cells() -> None:
    n = 2 * CELL + 10
    case = Case(Sce(select_topk=0.75), torch.zeros(n), torch.ones(n), torch.full((n,), 3.0))
    kept = int(0.75 * n)
    assert CELL < kept < 2 * CELL
    merged = case.merged()
    assert torch.equal(merged != 0, torch.arange(n) < kept)
    assert merged[:kept].tolist() == pytest.approx([2.8] * kept)  # (1 * 1 + 9 * 3) / 10


def test_models_that_are_equal_do_not_vary_though_their_mean_is_rounded() -> None:
    base, model = vectors(1, 1000)
    thrice = [model + 0.1] * 3
    assert Case(Sce(select_topk=0.9), base, *thrice).merged().tolist() == [0.0] * 1000


def test_small_updates_weigh_alike() -> None:
    # as in mergekit: mean squares of 1e-8 and 4e-8 add up to less than 1e-6
    assert delta([1e-4], [2e-4]) == pytest.approx([1.5e-4])


def test_where_nothing_is_kept_the_base_comes_out_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 1e-30, 0.3, -5.0])
    models = [base + torch.tensor([0.0, 0.0, 0.1, step]) for step in (2.0, 3.0)]
    merged = Case(Sce(select_topk=0.99), base, *models).values()
    assert torch.equal(merged.view(torch.int32), base.view(torch.int32))  # 0.99 is cut to 0
    merged = Case(Sce(), base, base, base).values()
    assert torch.equal(merged.view(torch.int32), base.view(torch.int32))


def test_one_model_is_copied_and_has_nothing_to_select_by() -> None:
    assert Sce().copies(1, "w", NOWHERE) == 0
    assert Sce(select_topk=0.5).copies(1, "w", NOWHERE) == -1
    assert Sce(select_topk=0.0).copies(2, "w", NOWHERE) == -1
    assert Sce(select_topk=0.5).copies(2, "w", NOWHERE) is None


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("select_topk", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_merge_to_the_float64_reference(
    k: int, select_topk: float, dtype: torch.dtype
) -> None:
    # on a grid, and of 2^i models, so that variances are exact and many equal the threshold
    base, *tuned = vectors(k, 2 * CELL + 100, seed=k)
    case = Case(Sce(select_topk=select_topk), base, *tuned, dtype=dtype)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [3, 5])
def test_off_the_grid_places_are_kept_as_in_float64(k: int) -> None:
    draws = torch.randn((1 + k, 1000), generator=torch.Generator().manual_seed(k))
    case = Case(Sce(select_topk=0.3), draws[0], *draws[1:])
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-5, atol=1e-5)
