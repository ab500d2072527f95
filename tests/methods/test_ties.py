"""TIES: trim each task vector, elect a sign for each element, merge those that agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import mergekit_ft
from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.ties import Ties
from tests.checkpoints import write_checkpoint
from tests.merging import Case, vectors


def delta(*task_vectors: list[float], **parameters: Any) -> list[float]:
    """Return the merged delta of models that differ from a base of zeros."""
    for name in ("weight", "density"):
        value = parameters.setdefault(name, 1.0)
        if isinstance(value, float):
            parameters[name] = (value,) * len(task_vectors)
    zeros = [0.0] * len(task_vectors[0])
    return Case(Ties.model_validate(parameters), zeros, *task_vectors).merged().tolist()


# --- trim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (1.0, [5.0, -4.0, 3.0, -2.0, 1.0]),
        (0.4, [5.0, -4.0, 0.0, 0.0, 0.0]),  # 0.4 * 5 = 2
        (0.39, [5.0, 0.0, 0.0, 0.0, 0.0]),  # 1.95 is cut to 1
        (0.01, [5.0, 0.0, 0.0, 0.0, 0.0]),  # 0.05 is cut to 0, but one is kept
        (0.0, [0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_largest_magnitudes_are_kept(density: float, kept: list[float]) -> None:
    assert delta([5.0, -4.0, 3.0, -2.0, 1.0], density=density) == kept


def test_of_equal_magnitudes_at_the_threshold_the_first_are_kept() -> None:
    assert delta([1.0, -1.0, 1.0, 2.0, -1.0], density=0.6) == [1.0, -1.0, 0.0, 2.0, 0.0]


def test_the_first_of_equal_magnitudes_are_kept_across_cells() -> None:
    n = 2 * CELL + 10
    case = Case(Ties(weight=(1.0,), density=(0.75,)), torch.zeros(n), -torch.ones(n))
    kept = int(0.75 * n)  # ends within the second cell
    assert CELL < kept < 2 * CELL
    assert case.merged().tolist() == [-1.0] * kept + [0.0] * (n - kept)


def test_what_is_trimmed_is_the_task_vector_not_the_model() -> None:
    # deltas 0.5 and 1 on a base of 100 and 1
    case = Case(Ties(weight=(1.0,), density=(0.5,)), [100.0, 1.0], [100.5, 2.0])
    assert case.values().tolist() == [100.0, 2.0]


def test_each_model_has_its_own_density() -> None:
    # the first keeps (4, 0), the second (1, 1): mean 2.5 and 1
    assert delta([4.0, 3.0], [1.0, 1.0], density=(0.5, 1.0)) == [2.5, 1.0]


def test_a_density_outside_0_to_1_is_refused() -> None:
    for density in (-0.1, 1.1):
        with pytest.raises(ValidationError):
            Ties(weight=(1.0,), density=(density,))


def test_rescaling_restores_the_norm_of_each_task_vector() -> None:
    # |(3, 1, 1, 1)| = 6 against 3: 3 * 2. Nothing of a delta of zeros: its factor is 1.
    assert delta([3.0, 1.0, 1.0, 1.0], density=0.25, rescale=True) == [6.0, 0.0, 0.0, 0.0]
    assert delta([0.0, 0.0], density=0.5, rescale=True) == [0.0, 0.0]


# --- elect and merge ----------------------------------------------------------------------------


def test_the_mean_is_of_those_whose_sign_is_elected() -> None:
    # 1 + 3 - 2 > 0: (1 + 3) / 2
    assert delta([1.0], [3.0], [-2.0]) == [2.0]


def test_a_sign_is_elected_by_mass_not_by_count() -> None:
    # 1 + 1 - 5 < 0: -5 / 1
    assert delta([1.0], [1.0], [-5.0]) == [-5.0]


def test_an_even_vote_elects_plus() -> None:
    # 2 - 2 = 0: 2 / 1, whichever model comes first
    assert delta([2.0], [-2.0]) == delta([-2.0], [2.0]) == [2.0]


def test_zeros_are_never_counted() -> None:
    # 3 / 1, not 3 / 2
    assert delta([0.0], [3.0]) == [3.0]


def test_the_mean_is_weighted() -> None:
    # 1 * 1 + 2 * 3 - 1 * 2 > 0: (1 + 6) / (1 + 2)
    assert delta([1.0], [3.0], [-2.0], weight=(1.0, 2.0, 1.0)) == pytest.approx([7 / 3])


def test_weights_have_a_say_in_the_election() -> None:
    # 3 * 1 - 1 * 2 > 0: 3 / 3
    assert delta([1.0], [-2.0], weight=(3.0, 1.0)) == [1.0]


def test_without_normalising_it_is_a_sum() -> None:
    # 1 * 1 + 2 * 3
    assert delta([1.0], [3.0], [-2.0], weight=(1.0, 2.0, 1.0), normalize=False) == [7.0]


def test_a_negative_weight_votes_with_the_opposite_sign() -> None:
    # 1 - 3 = -2 elects -; the sum -3 is divided by the raw weight -1, as in mergekit
    assert delta([1.0], [3.0], weight=(1.0, -1.0), normalize=False) == [-3.0]
    assert delta([1.0], [3.0], weight=(1.0, -1.0)) == [3.0]


def test_lambda_scales_the_merged_delta() -> None:
    # 0.4 (1 + 3) / 2
    assert delta([1.0], [3.0], [-2.0], **{"lambda": 0.4}) == pytest.approx([0.8])


def test_trimmed_entries_have_no_vote() -> None:
    # the first keeps (5, 0), the second (0, -2), which the first's 3 would have outvoted
    assert delta([5.0, 3.0], [-1.0, -2.0], density=0.5) == [5.0, -2.0]


def test_int8_mask_changes_nothing() -> None:
    assert delta([1.0], [3.0], [-2.0], int8_mask=True) == [2.0]


# --- scope --------------------------------------------------------------------------------------

FIRST, SECOND = [4.0, -3.0], [2.0, 1.0]


def scoped(folder: Path, scope: str, first: list[float], second: list[float]) -> dict[str, Any]:
    zeros = {"a.weight": torch.zeros(len(first)), "b.weight": torch.zeros(len(second))}
    tuned = {"a.weight": torch.tensor(first), "b.weight": torch.tensor(second)}
    plan = {
        "merge_method": "ties",
        "base_model": str(write_checkpoint(folder / "base", zeros, config={})),
        "models": [{"model": str(write_checkpoint(folder / "tuned", tuned, config={}))}],
        "parameters": {"weight": 1.0, "density": 0.5, "scope": scope},
    }
    with mergekit_ft.open_plan(plan) as merged:
        return {name: tensor.tolist() for name, tensor in merged.items()}


def test_within_a_tensor_each_tensor_keeps_its_share(tmp_path: Path) -> None:
    merged = scoped(tmp_path, "tensor", FIRST, SECOND)
    assert merged == {"a.weight": [4.0, 0.0], "b.weight": [2.0, 0.0]}


def test_within_the_model_a_tensor_may_keep_all_and_another_nothing(tmp_path: Path) -> None:
    merged = scoped(tmp_path, "model", FIRST, SECOND)
    assert merged == {"a.weight": [4.0, -3.0], "b.weight": [0.0, 0.0]}


def test_within_the_model_the_first_of_equals_are_those_of_the_first_tensor(tmp_path: Path) -> None:
    merged = scoped(tmp_path, "model", [1.0, 1.0, 1.0], [2.0, -1.0, 1.0])
    assert merged == {"a.weight": [1.0, 1.0, 0.0], "b.weight": [2.0, 0.0, 0.0]}


def test_within_the_model_cells_are_counted_over_all_tensors(tmp_path: Path) -> None:
    # half of 3 CELL + 10 ones: all of a smaller first tensor, or a part of a larger one
    for number, (first, second) in enumerate(((CELL + 5, 2 * CELL + 5), (2 * CELL + 5, CELL + 5))):
        merged = scoped(tmp_path / str(number), "model", [1.0] * first, [1.0] * second)
        kept = (3 * CELL + 10) // 2
        assert merged["a.weight"] == [1.0] * min(kept, first) + [0.0] * max(0, first - kept)
        left = max(0, kept - first)
        assert merged["b.weight"] == [1.0] * left + [0.0] * (second - left)


def test_within_the_model_densities_may_not_differ_between_tensors() -> None:
    assert Ties(weight=(1.0,), density=(0.5,), scope="model").same_everywhere() == (0.5,)
    assert Ties(weight=(1.0,), density=(0.5,)).same_everywhere() is None


# --- copies and reference -----------------------------------------------------------------------


def test_a_model_that_alone_is_heard_is_copied_unless_it_is_trimmed() -> None:
    assert Ties(weight=(0.0, 0.7), density=(1.0, 1.0)).copies(2, "w", NOWHERE) == 1
    assert Ties(weight=(0.0, 0.7), density=(1.0, 0.5)).copies(2, "w", NOWHERE) is None
    assert Ties(weight=(0.7,), density=(1.0,), normalize=False).copies(1, "w", NOWHERE) is None
    assert Ties(weight=(0.0, 0.0)).copies(2, "w", NOWHERE) == -1


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_merge_to_the_float64_reference(
    normalize: bool, rescale: bool, dtype: torch.dtype
) -> None:
    # on a grid of 4096 steps, so that many magnitudes stand equal at the threshold
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = Ties(
        weight=(1.0, 0.5, 0.25),
        density=(0.2, 0.5, 1.0),
        normalize=normalize,
        rescale=rescale,
    )
    case = Case(operator, base, *tuned, dtype=dtype)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=1e-5, atol=1e-5)
