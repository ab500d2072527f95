"""Edits in closed form: equal to the textbook formulas, written out here with whole inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_ft.algebra.associations import (
    Metric,
    exact,
    null_space,
    projected,
    regularised,
    require_seen,
)
from mergekit_ft.errors import OperatorError

NEAR = 1e-8  # relative
OUT, IN, MET = 24, 40, 400  # sizes of W, and keys that C is of


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=dice(seed), dtype=torch.float64)


def second_moment(seed: int) -> Tensor:
    """Return C of keys whose directions differ in size a thousandfold, as a model's do."""
    met = normal(seed, MET, IN) * torch.logspace(-2, 1, IN, dtype=torch.float64)
    return met.T @ met / MET


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("seed", range(4))
def test_one_key_is_written_as_rome_and_as_emmet_write_it(seed: int) -> None:
    c, k, r = second_moment(seed), normal(seed + 10, IN), normal(seed + 20, OUT)
    ours = exact(k, r, Metric(c))
    u = torch.linalg.inv(c) @ k
    u = u / u.norm()
    assert apart(ours, torch.outer(r, u) / (u @ k)) < NEAR  # ROME: (v - W k) u^T / (u^T k)
    keys, residuals, inverse = k[:, None], r[:, None], torch.linalg.inv(c)
    emmet = residuals @ torch.linalg.inv(keys.T @ inverse @ keys) @ keys.T @ inverse
    assert apart(ours, emmet) < NEAR


def test_one_key_gets_its_value_exactly_and_with_no_metric_by_the_shortest_update() -> None:
    k, r = normal(1, IN), normal(2, OUT)
    assert apart(exact(k, r, Metric(second_moment(3))) @ k, r) < 1e-12
    assert apart(exact(k, r, None), torch.outer(r, k) / (k @ k)) < 1e-12


def test_of_all_updates_that_write_the_key_the_least_is_found_in_c() -> None:
    c, k, r = second_moment(5), normal(6, IN), normal(7, OUT)
    ours = exact(k, r, Metric(c))
    cost = torch.trace(ours @ c @ ours.T)
    for seed in range(20):
        other = 0.01 * normal(seed, OUT, IN)
        other = ours + other - torch.outer(other @ k, k) / (k @ k)  # D k = r still
        assert torch.trace(other @ c @ other.T) >= cost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 7, 90])
def test_many_keys_are_written_as_memit_writes_them(seed: int, n: int) -> None:
    c, keys, residuals = second_moment(seed), normal(seed + 1, IN, n), normal(seed + 2, OUT, n)
    ours = regularised(keys, residuals, Metric(c), 15.0)
    textbook = residuals @ keys.T @ torch.linalg.inv(15.0 * c + keys @ keys.T)
    assert apart(ours, textbook) < NEAR


def test_keys_that_repeat_are_no_trouble_to_many() -> None:
    c, key = second_moment(1), normal(2, IN, 1)
    keys, residuals = key.expand(-1, 3), normal(3, OUT, 3)
    textbook = residuals @ keys.T @ torch.linalg.inv(2.0 * c + keys @ keys.T)
    assert apart(regularised(keys, residuals, Metric(c), 2.0), textbook) < NEAR


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("earlier", [0, 5])
def test_the_null_space_is_written_in_as_alphaedit_writes_it(seed: int, earlier: int) -> None:
    c, keys, residuals = second_moment(seed), normal(seed + 1, IN, 6), normal(seed + 2, OUT, 6)
    before = normal(seed + 3, IN, earlier)
    basis = null_space(c, 2e-2)
    values, vectors = torch.linalg.eigh(c)
    u = vectors[:, values < 2e-2]
    assert 0 < basis.shape[1] < IN
    p, m, eye = u @ u.T, before @ before.T, torch.eye(IN, dtype=torch.float64)
    inner = keys @ keys.T @ p + m @ p + 10.0 * eye
    textbook = torch.linalg.solve(inner.T, (residuals @ keys.T @ p).T).T
    ours = projected(keys, residuals, basis, before if earlier else None, 10.0)
    assert apart(ours, textbook) < NEAR


def test_what_lies_outside_the_null_space_is_preserved() -> None:
    met = normal(1, IN, 12)  # keys of text, of 12 directions
    basis = null_space(met @ met.T / 12, 1e-9)
    assert basis.shape == (IN, IN - 12)
    update = projected(normal(2, IN, 6), normal(3, OUT, 6), basis, None, 1.0)
    assert float((update @ met).norm() / (update.norm() * met.norm())) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_keys_are_solved_in_float64(dtype: torch.dtype) -> None:
    c, keys, residuals = second_moment(1), normal(2, IN, 3).to(dtype), normal(3, OUT, 3).to(dtype)
    wide = regularised(keys.double(), residuals.double(), Metric(c), 15.0)
    assert torch.equal(regularised(keys, residuals, Metric(c), 15.0), wide)


def test_a_singular_or_ill_conditioned_c_is_refused_with_what_to_do() -> None:
    met = normal(1, IN, 12)
    with pytest.raises(OperatorError, match=r"it is singular.*give more text"):
        Metric(torch.zeros(IN, IN))
    with pytest.raises(OperatorError, match="give more text"):
        Metric(met @ met.T)
    basis = torch.linalg.qr(normal(2, IN, IN))[0]
    for least, fine in ((1e-8, True), (1e-14, False)):
        sizes = torch.ones(IN, dtype=torch.float64)
        sizes[3] = least
        c = basis * sizes @ basis.T
        if fine:
            Metric((c + c.T) / 2)
            continue
        with pytest.raises(OperatorError, match=r"condition is|singular"):
            Metric((c + c.T) / 2)


def test_statistics_that_hold_nan_are_refused() -> None:
    c = second_moment(1)
    c[2, 3] = float("nan")
    with pytest.raises(OperatorError, match="NaN"):
        Metric(c)
    with pytest.raises(OperatorError, match="NaN"):
        null_space(c, 1.0)


def test_a_null_space_of_nothing_is_refused() -> None:
    with pytest.raises(OperatorError, match=r"below 1e-09.*raise the threshold"):
        null_space(torch.eye(IN), 1e-9)


def test_a_key_of_zeros_is_refused() -> None:
    with pytest.raises(OperatorError, match="the key is zero"):
        exact(torch.zeros(IN), torch.ones(OUT), None)


def test_edits_that_cannot_be_told_apart_are_refused() -> None:
    keys = 1e12 * torch.ones(IN, 3, dtype=torch.float64)
    with pytest.raises(OperatorError, match="drop edits that repeat others"):
        projected(keys, torch.ones(OUT, 3), torch.eye(IN, dtype=torch.float64), None, 1e-30)


def test_statistics_of_few_tokens_are_refused() -> None:
    require_seen(400, 40)
    with pytest.raises(OperatorError, match=r"399 tokens are too few.*at least 400"):
        require_seen(399, 40)
