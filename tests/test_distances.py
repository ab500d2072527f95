"""How far tensors are apart: steps worked by hand, sums against numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_ft.algebra.distances import BINS, apart, binned, bits, distance, edges, ordered
from mergekit_ft.contract import CELL

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def steps(a: Tensor, b: Tensor) -> list[int]:
    return [int(x) for x in distance(ordered(bits(a)), ordered(bits(b)))]


def filled(bins: Any) -> dict[tuple[int, int], int]:
    return {edges(place): int(count) for place, count in enumerate(bins) if count}


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_are_one_step_apart_across_zero_and_powers_of_two(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps  # the gap above 1; below 1 it is half of that
    least = torch.ones(1, dtype=SIGNED[dtype.itemsize]).view(dtype).item()  # above zero
    a = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, -0.0, -least, 0.0, 2.0], dtype=dtype)
    b = torch.tensor(
        [1.0, 1 + eps, 1 - eps / 2, -1 - 2 * eps, least, 0.0, least, -least, 4.0], dtype=dtype
    )
    octave = round(1 / eps)  # numbers from one power of two to the next
    assert steps(a, b) == [0, 1, 1, 2, 1, 0, 2, 1, octave]


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_distance_overflows_from_the_least_number_to_the_largest(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    a, b = torch.tensor([-most], dtype=dtype), torch.tensor([most], dtype=dtype)
    one = int(bits(b)[0])  # how many steps from zero
    assert steps(a, b) == [2 * one]


def test_steps_of_bfloat16_are_those_counted_one_by_one() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = sorted({float(v) for v in every.float().tolist() if math.isfinite(v)})
    place = {value: i for i, value in enumerate(values)}  # -0 and 0 are one
    rng = np.random.default_rng(0)
    pairs = rng.choice(values, size=(2, 400))
    a, b = (torch.tensor(row, dtype=torch.bfloat16) for row in pairs)
    expected = [abs(place[x] - place[y]) for x, y in zip(*pairs.tolist(), strict=True)]
    assert steps(a, b) == expected


@pytest.mark.parametrize("width", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_bins_are_0_1_2_then_to_the_powers_of_two(width: Any) -> None:
    given = [0, 0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 127]
    expected = {(0, 0): 2, (1, 1): 1, (2, 2): 1, (3, 4): 2, (5, 8): 2, (9, 16): 2}
    assert filled(binned(np.array(given, width))) == {**expected, (17, 32): 1, (65, 128): 1}
    last = int(np.iinfo(width).max)
    (found,) = filled(binned(np.array([last], width)))
    assert found == (2 ** (8 * width().itemsize - 1) + 1, 2 ** (8 * width().itemsize))


def test_bins_of_numbers_that_float64_cannot_hold_are_exact() -> None:
    given = np.array([2**53 + 1, 2**60, 2**60 + 1, 2**63 + 1], np.uint64)
    found = {(2**53 + 1, 2**54): 1, (2**59 + 1, 2**60): 1, (2**60 + 1, 2**61): 1}
    assert filled(binned(given)) == {**found, (2**63 + 1, 2**64): 1}


def test_a_hand_worked_tensor() -> None:
    a = torch.tensor([1.0, -2.0, 0.0, 4.0, 3.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0078125, -2.0, 1.0, -4.0, 3.0], dtype=torch.bfloat16)
    found = apart(a, b)
    moved = 0.0078125**2 + 1 + 64
    dot = 1.0078125 + 4 + 0 - 16 + 9
    assert found.sums.tolist() == [[30.0, 1.0078125**2 + 4 + 1 + 16 + 9, dot, moved]]
    assert (found.finite, found.changed, found.agree, found.largest) == (5, 3, 3, 8.0)
    # 0 to 1 are 127 octaves of 128 numbers less the subnormals' one: bits 0x3f80 = 16256;
    # 4 to -4 is twice 0x4080 = 33024
    assert filled(found.bins) == {(0, 0): 2, (1, 1): 1, (8193, 16384): 1, (32769, 65536): 1}


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_those_of_numpy_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = torch.randn(2 * CELL + 333, dtype=torch.float64).to(dtype)
    b = (a.double() + 0.01 * torch.randn(len(a), dtype=torch.float64)).to(dtype)
    found = apart(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    for number, values in enumerate((x * x, y * y, x * y, (y - x) ** 2)):
        total = math.fsum(found.sums[:, number].tolist())
        assert total == pytest.approx(math.fsum(values), rel=1e-13)
    assert found.sums.shape == (3, 4)
    assert found.changed == int((x != y).sum())
    assert found.agree == int((np.sign(x) == np.sign(y)).sum())
    assert found.largest == np.abs(y - x).max()
    assert found.bins.sum() == len(x)
    assert found.bins.shape == (BINS,)


def test_equal_runs_have_the_sums_of_the_long_way() -> None:
    torch.manual_seed(1)
    a = torch.randn(CELL + 5).to(torch.bfloat16)
    short = apart(a, a.clone())
    b = a.clone()
    b[-1] = 0.0
    long = apart(a, b)
    assert torch.equal(short.sums[0], long.sums[0])
    assert (short.changed, short.largest) == (0, 0.0)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([1.0, nan, inf, 2.0, nan])
    b = torch.tensor([1.0, 5.0, 2.0, -inf, nan])
    found = apart(a, b)
    assert found.odd == (2, 1, 1, 1)
    assert found.sums.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert (found.finite, found.changed, found.agree, found.largest) == (1, 3, 1, 0.0)
    same = apart(a, a.clone())
    assert same.odd == (2, 1, 2, 1)
    assert (same.finite, same.changed) == (2, 0)


def test_a_zero_that_changes_its_sign_is_changed_by_no_step() -> None:
    found = apart(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found.changed == 1
    assert filled(found.bins) == {(0, 0): 2}


def test_two_dtypes_are_compared_by_value_and_stepped_in_the_coarser() -> None:
    a = torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0, 1.0 + 2**-20, 1.0 + 2**-7], dtype=torch.float32)
    found = apart(a, b)
    assert found.changed == 2
    assert filled(found.bins) == {(0, 0): 2, (1, 1): 1}
    assert found.largest == 2**-7
    assert torch.equal(apart(b, a).sums[:, 3], found.sums[:, 3])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_floats_too(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 2.0, -1.0]).to(dtype)
    b = torch.tensor([1.0, 4.0, 1.0]).to(dtype)
    found = apart(a, b)
    assert (found.changed, found.agree, found.largest) == (2, 2, 2.0)
    octave = 8 if dtype == torch.float8_e4m3fn else 4
    assert steps(a[1:2], b[1:2]) == [octave]
