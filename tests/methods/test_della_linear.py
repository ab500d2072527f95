"""DELLA: entries are kept at random, the larger of a row the likelier, and rescaled."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mergekit_ft.contract import CELL, NOWHERE, Grain
from mergekit_ft.methods.dare_linear import DareLinear
from mergekit_ft.methods.della_linear import DellaLinear
from tests.merging import Case, vectors

ROWS, LENGTH = 4000, 5
N = ROWS * LENGTH
SIGMAS = 5.0


def case(*task_vectors: Any, shape: tuple[int, ...] | None = None, **parameters: Any) -> Case:
    for name in ("weight", "density"):
        parameters.setdefault(name, (1.0,) * len(task_vectors))
    parameters.setdefault("epsilon", (0.0,) * len(task_vectors))
    operator = DellaLinear.model_validate(parameters)
    return Case(
        operator, torch.zeros_like(torch.as_tensor(task_vectors[0])), *task_vectors, shape=shape
    )


def rows_of(*values: float) -> Tensor:
    """Return rows that all hold these values."""
    return torch.tensor(values).repeat(ROWS)


def shares(kept: Tensor) -> list[float]:
    """Return how often the entry at each place of a row is kept."""
    return (kept.view(ROWS, LENGTH) != 0).double().mean(0).tolist()


def test_the_chance_of_an_entry_rises_with_its_rank_within_the_row() -> None:
    # ranks 2, 0, 4, 1, 3 of five: 0.5 - 0.3 + 0.6 rank / 4
    vector = rows_of(3.0, -1.0, -5.0, 2.0, 4.0)
    pruned = case(vector, shape=(ROWS, LENGTH), density=(0.5,), epsilon=(0.3,), rescale=False)
    expected = [0.5, 0.2, 0.8, 0.35, 0.65]
    for share, p in zip(shares(pruned.merged()), expected, strict=True):
        assert abs(share - p) < SIGMAS * sqrt(p * (1 - p) / ROWS)


def test_of_equal_magnitudes_the_first_is_ranked_lowest() -> None:
    pruned = case(
        rows_of(1.0, -1.0, 1.0, 1.0, -1.0),
        shape=(ROWS, LENGTH),
        density=(0.5,),
        epsilon=(0.4,),
        rescale=False,
    )
    for share, p in zip(shares(pruned.merged()), [0.1, 0.3, 0.5, 0.7, 0.9], strict=True):
        assert abs(share - p) < SIGMAS * sqrt(p * (1 - p) / ROWS)


def test_a_row_lies_along_the_last_axis_of_any_tensor() -> None:
    vector = rows_of(3.0, -1.0, -5.0, 2.0, 4.0)
    same: dict[str, Any] = {"density": (0.5,), "epsilon": (0.3,)}
    flat, deep = (
        case(vector, shape=shape, **same).merged()
        for shape in ((ROWS, LENGTH), (40, ROWS // 40, LENGTH))
    )
    assert torch.equal(flat, deep)


def test_a_tensor_of_one_axis_is_one_row() -> None:
    n = 20_000
    kept = case(torch.arange(1.0, n + 1), density=(0.5,), epsilon=(0.4,), rescale=False).merged()
    low, high = (
        float((kept[half] != 0).double().mean()) for half in (slice(n // 2), slice(n // 2, n))
    )
    assert abs(low - 0.3) < SIGMAS * sqrt(0.25 / (n / 2))  # the mean of 0.1 to 0.5
    assert abs(high - 0.7) < SIGMAS * sqrt(0.25 / (n / 2))


def test_a_row_of_one_entry_keeps_it_by_the_density() -> None:
    kept = case(torch.ones(N), shape=(N, 1), density=(0.3,), epsilon=(0.2,), rescale=False).merged()
    assert abs(float(kept.mean()) - 0.3) < SIGMAS * sqrt(0.3 * 0.7 / N)


def test_rescaling_by_probability_divides_each_entry_by_its_own() -> None:
    vector = rows_of(3.0, -1.0, -5.0, 2.0, 4.0)
    merged = case(
        vector,
        shape=(ROWS, LENGTH),
        density=(0.5,),
        epsilon=(0.3,),
        rescaling="probability",
    ).merged()
    found = {round(value, 4) for value in merged.tolist()} - {0.0}
    assert found == {6.0, -5.0, -6.25, 5.7143, 6.1538}  # 3/0.5, -1/0.2, -5/0.8, 2/0.35, 4/0.65


def test_rescaling_by_probability_is_unbiased_entry_by_entry() -> None:
    vector = rows_of(3.0, -1.0, -5.0, 2.0, 4.0)
    merged = case(
        vector, shape=(ROWS, LENGTH), density=(0.5,), epsilon=(0.3,), rescaling="probability"
    ).merged()
    means = merged.double().view(ROWS, LENGTH).mean(0).tolist()
    chances = [0.5, 0.2, 0.8, 0.35, 0.65]
    for mean, value, p in zip(means, [3.0, -1.0, -5.0, 2.0, 4.0], chances, strict=True):
        assert abs(mean - value) < SIGMAS * abs(value) * sqrt((1 - p) / p / ROWS)


def test_rescaling_by_norm_restores_the_norm() -> None:
    # |values| = 500 * 501 / 2 + 499 * 500 / 2 = 250,000
    merged = case(torch.arange(1000.0) - 500, density=(0.3,), epsilon=(0.1,)).merged().double()
    assert float(merged.abs().sum()) == pytest.approx(250_000, rel=1e-6)


def test_without_epsilon_its_masks_are_those_of_dare() -> None:
    vector = torch.arange(1.0, N + 1)
    della = case(vector, shape=(ROWS, LENGTH), density=(0.4,), seed=3, rescale=False).merged()
    dare = DareLinear(weight=(1.0,), density=(0.4,), seed=3, rescale=False)
    assert torch.equal(della, Case(dare, torch.zeros(N), vector).merged())


def test_where_nothing_is_dropped_it_is_a_weighted_sum() -> None:
    merged = case([1.0, -2.0], [3.0, 4.0], weight=(0.5, 0.25), **{"lambda": 2.0}).merged()
    assert merged.tolist() == [2.5, 0.0]
    assert case([1.0], [3.0], weight=(1.0, 3.0), normalize=True).merged().tolist() == [2.5]


def test_everything_may_be_dropped() -> None:
    assert case([1.0, 2.0], density=(0.0,), epsilon=(0.15,)).merged().tolist() == [0.0, 0.0]


def test_what_is_dropped_comes_out_as_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 0.1, 1e-30]).repeat(100)
    operator = DellaLinear(weight=(1.0,), density=(0.5,), epsilon=(0.2,))
    whole = Case(operator, base, base + 1.0, shape=(100, 3))
    dropped, values = whole.merged() == 0, whole.values()
    assert 0 < int(dropped.sum()) < 300
    assert torch.equal(values[dropped].view(torch.int32), base[dropped].view(torch.int32))


@pytest.mark.parametrize(
    ("density", "epsilon", "told"),
    [
        (0.9, 0.1, "from 0.8 to 1, which must lie between 0 and 1; give epsilon less than 0.1"),
        (0.9, 0.15, "from 0.75 to 1.05"),
        (0.1, 0.1, "from 0 to 0.2"),
    ],
)
def test_probabilities_of_0_or_1_are_refused(density: float, epsilon: float, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DellaLinear(weight=(1.0,), density=(density,), epsilon=(epsilon,))


def test_rows_are_seen_whole_only_where_entries_are_ranked() -> None:
    plain = DellaLinear(weight=(1.0,), density=(0.5,), epsilon=(0.1,))
    assert plain.grain is Grain.ROW
    assert plain.model_copy(update={"density": (1.0,)}).grain is Grain.ELEMENT


def test_a_model_that_alone_is_heard_is_copied_unless_it_is_dropped_from() -> None:
    whole = DellaLinear(weight=(0.0, 1.0), density=(1.0, 1.0), epsilon=(0.1, 0.1))
    assert whole.copies(2, "w", NOWHERE) == 1
    assert whole.model_copy(update={"density": (1.0, 0.5)}).copies(2, "w", NOWHERE) is None


def test_masks_that_there_is_no_room_to_keep_are_made_again_the_same() -> None:
    base, *tuned = vectors(2, 300 * 451)
    operator = DellaLinear(weight=(1.0, 0.5), density=(0.5, 0.8), epsilon=(0.2, 0.1), seed=7)
    roomy, tight = (Case(operator, base, *tuned, shape=(300, 451)) for _ in range(2))
    tight.about = replace(tight.about, spare=2 * base.numel() // 8 - 1)
    assert [len(case.finding().masks) for case in (roomy, tight)] == [6, 0]  # 2 models, 3 blocks
    assert torch.equal(roomy.merged(), tight.merged())


@pytest.mark.parametrize("rescaling", ["norm", "probability"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 451), (3, 100, 451)])
def test_blocks_merge_to_the_float64_reference(
    shape: tuple[int, ...], dtype: torch.dtype, rescaling: str
) -> None:
    n = shape[-1] * shape[-2] * (shape[0] if len(shape) == 3 else 1)
    assert n > CELL  # on a grid of 4096 steps, so that rows hold equal magnitudes
    base, *tuned = vectors(3, n)
    operator = DellaLinear(
        weight=(1.0, 0.5, 0.25),
        density=(0.5, 0.25, 1.0),
        epsilon=(0.2, 0.1, 0.3),
        rescaling=rescaling,
        seed=7,
    )
    whole = Case(operator, base, *tuned, dtype=dtype, shape=shape)
    torch.testing.assert_close(whole.merged().double(), whole.reference(), rtol=1e-5, atol=1e-5)
