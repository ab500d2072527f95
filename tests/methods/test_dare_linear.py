"""DARE: drop entries of each task vector at random, rescale the rest, add them up."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft.contract import CELL, NOWHERE
from mergekit_ft.methods.dare_linear import DareLinear
from tests.merging import Case, vectors

N = 200_000


def case(*task_vectors: Tensor, size: int = CELL, name: str = "w", **parameters: Any) -> Case:
    """Return models that differ from a base of zeros by these task vectors."""
    for word in ("weight", "density"):
        parameters.setdefault(word, (1.0,) * len(task_vectors))
    operator = DareLinear.model_validate(parameters)
    return Case(operator, torch.zeros(len(task_vectors[0])), *task_vectors, size=size, name=name)


def kept(**parameters: Any) -> Tensor:
    """Return which of N ones survive."""
    plain = {"rescale": False, "density": (0.5,), **parameters}
    return case(torch.ones(N), **plain).merged() != 0.0


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    # a binomial count: its standard deviation is sqrt(N p (1 - p)); 5 of them are 1 in 1.7 million
    count = int(kept(density=(density,)).sum())
    assert abs(count - N * density) < 5 * sqrt(N * density * (1 - density))


def test_density_1_keeps_all_and_0_nothing() -> None:
    assert kept(density=(1.0,)).all()
    assert not kept(density=(0.0,)).any()
    nothing = case(torch.ones(8), density=(0.0,), rescaling="density").merged()
    assert nothing.tolist() == [0.0] * 8


@pytest.mark.parametrize("rescaling", ["norm", "density"])
def test_the_mean_is_unbiased(rescaling: str) -> None:
    # survivors of 1 .. 4 in turn, p = 1/4; each seed's total has variance N mean(d^2) (1 - p) / p
    values = torch.arange(N).remainder(4) + 1.0
    totals = [
        case(values, density=(0.25,), rescaling=rescaling, seed=seed).merged().double().sum()
        for seed in range(8)
    ]
    deviation = sqrt(N * 7.5 * 3 / 8)
    assert abs(float(sum(totals)) / 8 - N * 2.5) < 5 * deviation


def test_rescaling_by_density_divides_what_is_kept_by_it() -> None:
    merged = case(torch.full((1000,), 3.0), density=(0.25,), rescaling="density").merged()
    assert set(merged.tolist()) == {0.0, 12.0}  # 3 / (1/4)


def test_rescaling_by_norm_restores_the_norm_of_the_task_vector() -> None:
    values = torch.arange(1000.0) - 500  # |values| = 500 * 501 / 2 + 499 * 500 / 2 = 250,000
    merged = case(values, density=(0.3,)).merged().double()
    assert float(merged.abs().sum()) == pytest.approx(250_000, rel=1e-6)


def test_without_rescaling_what_is_kept_stays_as_it_is() -> None:
    merged = case(torch.full((1000,), 3.0), density=(0.25,), rescale=False).merged()
    assert set(merged.tolist()) == {0.0, 3.0}


def test_task_vectors_are_added_with_their_weights() -> None:
    # nothing is dropped: 0.5 * 2 + 0.25 * -4 = 0, 0.5 * 6 + 0.25 * 4 = 4; lambda 0.5; sum w = 0.75
    two = torch.tensor([2.0, 6.0]), torch.tensor([-4.0, 4.0])
    weight = (0.5, 0.25)
    assert case(*two, weight=weight).merged().tolist() == [0.0, 4.0]
    assert case(*two, weight=weight, **{"lambda": 0.5}).merged().tolist() == [0.0, 2.0]
    normalised = case(*two, weight=weight, normalize=True).merged().tolist()
    assert normalised == pytest.approx([0.0, 4.0 / 0.75])


@pytest.mark.parametrize("cells", [1, 2, 3, 4])
def test_a_mask_is_the_same_whatever_the_block(cells: int) -> None:
    one, other = (
        case(torch.ones(N), density=(0.5,), size=size).merged() for size in (N, cells * CELL)
    )
    assert torch.equal(one, other)


def test_another_seed_tensor_or_model_has_another_mask() -> None:
    # two independent halves agree on half of the elements
    usual = kept()
    others = {
        "seed": kept(seed=1),
        "tensor": kept(name="v"),
        "model": case(torch.zeros(N), torch.ones(N), density=(1.0, 0.5), rescale=False).merged()
        != 0.0,
    }
    for what, mask in others.items():
        agree = int((mask == usual).sum())
        assert abs(agree - N / 2) < 5 * sqrt(N) / 2, what


def test_a_denser_mask_keeps_all_that_a_sparser_one_keeps() -> None:
    # an element's random number is its own, so a changed density changes only what it must
    assert not (kept(density=(0.2,)) & ~kept(density=(0.3,))).any()


def test_a_model_that_alone_is_heard_is_copied_unless_it_is_dropped_from() -> None:
    assert DareLinear(weight=(0.0, 1.0), density=(1.0, 1.0)).copies(2, "w", NOWHERE) == 1
    assert DareLinear(weight=(0.0, 1.0), density=(1.0, 0.5)).copies(2, "w", NOWHERE) is None
    assert DareLinear(weight=(0.0, 0.0), density=(0.5, 0.5)).copies(2, "w", NOWHERE) == -1


@pytest.mark.parametrize("rescaling", ["norm", "density"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_merge_to_the_float64_reference(rescaling: str, dtype: torch.dtype) -> None:
    base, *tuned = vectors(3, 2 * CELL + 100)
    operator = DareLinear(
        weight=(0.7, 0.9, -0.4),
        density=(0.3, 0.0, 1.0),
        rescaling=rescaling,
        normalize=True,
        lambda_=0.9,
        seed=7,
    )
    whole = Case(operator, base, *tuned, dtype=dtype)
    torch.testing.assert_close(whole.merged().double(), whole.reference(), rtol=1e-5, atol=1e-5)
