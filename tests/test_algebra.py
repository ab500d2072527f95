"""The algebra that methods share: selection, random masks, deltas, signs, sums over cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_ft.algebra import bracket, cells, deltas, randomness, selection, signs, spheres
from mergekit_ft.contract import CELL, About, Block
from mergekit_ft.layers import Place
from tests.merging import found, vectors

# --- selection ----------------------------------------------------------------------------------


def blocks(rows: Tensor, size: int, first_cell: int = 0) -> Iterator[Block]:
    """Yield blocks whose deltas are these (k, n) rows."""
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size].clone()
        n = part.shape[1]
        scratch = torch.full((selection.scratch(len(rows)), n), torch.nan, dtype=rows.dtype)
        base, cell = torch.zeros(n, dtype=rows.dtype), first_cell + start // CELL
        yield Block("w", (rows.shape[1],), start, base, part, "ab", Place(), cell, scratch)


def take(block: Block, i: int) -> Tensor:
    return block.scratch[0].copy_(block.tuned[i])


def kept(rows: Tensor, counts: Sequence[int | None], size: int = CELL) -> Tensor:
    """Return (k, n) what selection keeps, in blocks of `size`: by a bracket as by counting."""
    by_bracket, by_counting = cuts_of(rows, counts, size), cuts_of(rows, counts, size, most=0)
    assert by_bracket == by_counting
    return keeping(rows, by_bracket, size)


def cuts_of(
    rows: Tensor, counts: Sequence[int | None], size: int = CELL, most: int = bracket.MOST
) -> list[selection.Cut | None]:
    bits = 32 if rows.dtype == torch.float32 else 64
    with mock.patch.object(bracket, "MOST", most):
        survey = selection.largest(counts, take, About((), rows.shape[1], bits=bits))
        return found(survey, lambda: blocks(rows, size))


def keeping(rows: Tensor, cuts: Sequence[selection.Cut | None], size: int) -> Tensor:
    parts = []
    for block in blocks(rows, size):
        for row, cut in zip(block.tuned, cuts, strict=True):
            if cut is not None:
                selection.keep(row, cut, block.first_cell)
        parts.append(block.tuned)
    return torch.cat(parts, dim=1)


def sorted_and_cut(values: Tensor, count: int) -> list[float]:
    """Return the same by sorting in plain Python: by magnitude, then by index."""
    numbers = values.tolist()
    order = sorted(range(len(numbers)), key=lambda i: (-abs(numbers[i]), i))[:count]
    return [x if i in set(order) else 0.0 for i, x in enumerate(numbers)]


TRICKY = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 3e-39, 1.1754944e-38, 3.4e38, -3.4e38, 65535.0]
numbers = st.one_of(st.sampled_from(TRICKY), st.floats(width=32, allow_nan=False))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(numbers, min_size=1, max_size=40), st.booleans())
def test_the_largest_are_those_that_sorting_finds(
    data: st.DataObject, values: list[float], double: bool
) -> None:
    count = data.draw(st.integers(1, len(values)))
    vector = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    result = kept(vector[None], [count])[0]
    assert result.tolist() == sorted_and_cut(vector, count)


@settings(max_examples=12, deadline=None)
@given(
    n=st.sampled_from([CELL - 1, CELL, CELL + 1, 2 * CELL, 3 * CELL + 7]),
    share=st.floats(0, 1),
    steps=st.sampled_from([1, 3, 1000, 2**20]),
    size=st.sampled_from([CELL, 2 * CELL, 4 * CELL]),
    seed=st.integers(0, 2**16),
)
def test_selection_across_cells_is_a_stable_sort(
    n: int, share: float, steps: int, size: int, seed: int
) -> None:
    # few steps: thousands of equal magnitudes stand at the threshold, in every cell
    rolls = torch.Generator().manual_seed(seed)
    values = torch.randint(-steps, steps + 1, (n,), generator=rolls).float() / 8
    count = max(1, int(share * n))
    order = values.abs().sort(descending=True, stable=True).indices[:count]
    expected = torch.zeros_like(values)
    expected[order] = values[order]
    assert torch.equal(kept(values[None], [count], size)[0], expected)


def test_each_model_is_cut_at_its_own_count() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [-3.0, 2.0, -1.0]])
    assert kept(rows, [1, None, 2]).tolist() == [[0, 0, 3], [1, 2, 3], [-3, 2, 0]]


def test_a_selection_of_all_or_none_takes_no_pass() -> None:
    assert list(selection.largest([None, None], take, About((), 3))) == []


def test_selection_within_a_model_counts_cells_over_all_its_tensors() -> None:
    # two tensors of ones, one after the other in the stream: 2 of 3, then 4 of 3 + 3
    first, second = torch.ones(1, 3), torch.ones(1, 3)

    def stream() -> Iterator[Block]:
        yield from blocks(first, CELL, first_cell=0)
        yield from blocks(second, CELL, first_cell=1)

    for count, expected in ((2, [[1, 1, 0], [0, 0, 0]]), (4, [[1, 1, 1], [1, 0, 0]])):
        (cut,) = found(selection.largest([count], take, About((), 6)), stream)
        parts = [selection.keep(b.tuned[0], cut, b.first_cell).tolist() for b in stream()]
        assert parts == expected


@pytest.mark.parametrize(
    ("density", "numel", "count"),
    [(0.2, 10, 2), (0.29, 10, 2), (0.01, 10, 1), (1.0, 10, None), (0.0, 10, None)],
)
def test_a_density_is_cut_to_a_count_of_at_least_one(
    density: float, numel: int, count: int | None
) -> None:
    assert selection.count_for(density, numel) == count


@pytest.mark.parametrize("share", [0.0001, 0.2, 0.5, 0.999])
def test_a_bracket_finds_the_threshold_of_ordinary_values_in_two_passes(share: float) -> None:
    rows = torch.randn(1, 3 * CELL + 5, generator=torch.Generator().manual_seed(7))
    rank = round(share * rows.shape[1])
    survey = bracket.find({0: rank}, take, About((), rows.shape[1]))
    passes = []
    place = found(counted(survey, passes), lambda: blocks(rows, CELL))[0]
    assert place.threshold == rows[0].abs().sort(descending=True).values[rank - 1]
    assert len(passes) == 2


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0, 1.0], [2.0, 3.0, 3.0, 3.0]])
def test_a_bracket_gives_up_where_equals_are_too_many_and_counting_does(
    values: list[float],
) -> None:
    rows = torch.tensor(values).repeat(CELL)[None]
    rank = rows.shape[1] // 2 + 3
    assert (
        found(bracket.find({0: rank}, take, About((), rows.shape[1])), lambda: blocks(rows, CELL))
        == {}
    )
    assert int((kept(rows, [rank]) != 0).sum()) == min(rank, int((rows != 0).sum()))


def test_a_bracket_gives_up_unread_where_there_is_no_room_for_what_it_collects() -> None:
    assert list(bracket.find({0: 5}, take, About((), 10**6, spare=10**5))) == []


def counted(survey: bracket.Found, passes: list[int]) -> bracket.Found:
    """Pass a survey through and count its passes."""
    totals = None
    try:
        while True:
            measures = survey.send(totals) if passes else next(survey)
            passes.append(len(measures))
            totals = yield measures
    except StopIteration as stop:
        return stop.value


# --- random masks -------------------------------------------------------------------------------

KEY = randomness.key_of(0, "./maths", "model.layers.0.mlp.up_proj.weight")
M = 2**20


def mask(key: randomness.Key = KEY, start: int = 0, n: int = M, share: float = 0.5) -> Tensor:
    """Return (n,) ones and zeros of a mask."""
    return torch.from_numpy(randomness.keep_mask(key, start, n, share)).float()


def chi_square(counts: Tensor) -> float:
    expected = float(counts.sum()) / counts.numel()
    return float(((counts.double() - expected) ** 2 / expected).sum())


def bound(freedom: int) -> float:
    """Return what chi-square with so many degrees of freedom passes once in about 3 million."""
    return freedom + 5 * math.sqrt(2 * freedom) + 2 / 3 * 25


@pytest.mark.parametrize("share", [1e-5, 0.001, 0.1, 0.37, 0.5, 0.9])
def test_a_mask_keeps_its_share(share: float) -> None:
    count = int(mask(share=share).sum())
    assert abs(count - M * share) < 5 * math.sqrt(M * share * (1 - share))


def test_the_share_is_even_along_the_tensor() -> None:
    per_run = mask().view(1024, -1).sum(1)  # 1024 runs of 1024: variance 1/4 an element
    assert float(((per_run.double() - 512) ** 2 / 256).sum()) < bound(1024)
    per_column = mask().view(-1, 1024).sum(0)
    assert float(((per_column.double() - 512) ** 2 / 256).sum()) < bound(1024)


@pytest.mark.parametrize("bits", [8, 12])
def test_runs_of_neighbours_take_every_pattern_equally(bits: int) -> None:
    words = mask().long()[: M // bits * bits].view(-1, bits) @ (2 ** torch.arange(bits))
    assert chi_square(torch.bincount(words, minlength=2**bits)) < bound(2**bits - 1)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 576, 1024, CELL])
def test_elements_that_lie_apart_are_independent(lag: int) -> None:
    signs_ = mask() * 2 - 1
    product = float((signs_[lag:] * signs_[:-lag]).sum())
    assert abs(product) < 5 * math.sqrt(M - lag)


def neighbouring_keys() -> list[randomness.Key]:
    return [
        *(randomness.key_of(seed, "./maths", "w") for seed in range(3)),
        *(randomness.key_of(0, model, "w") for model in ("./chat", "./code")),
        *(randomness.key_of(0, "./maths", f"model.layers.{i}.w") for i in range(3)),
    ]


def test_masks_of_other_keys_are_independent() -> None:
    masks = [mask(key) * 2 - 1 for key in neighbouring_keys()]
    for i, one in enumerate(masks):
        for j, other in enumerate(masks[:i]):
            assert abs(float((one * other).sum())) < 5 * math.sqrt(M), (i, j)
            # nor is one the other, moved along: 1 element, as keys that differ by 1 would be
            product = float((one[1:] * other[:-1]).sum()), float((one[:-1] * other[1:]).sum())
            assert max(map(abs, product)) < 5 * math.sqrt(M), (i, j)


def test_a_key_tells_where_a_word_ends() -> None:
    keys = {randomness.key_of(1, "2", "3"), randomness.key_of(12, "", "3")}
    keys |= {randomness.key_of(1, "23", ""), randomness.key_of(1, "", "23")}
    assert len(keys) == 4


@pytest.mark.parametrize("start", [0, 3, 2**32 - 40, 2**34 - 40, 2**34, 5 * 2**34 - 38, 2**40])
@pytest.mark.parametrize("share", [0.5, 0.37])
def test_a_mask_is_one_however_it_is_cut(start: int, share: float) -> None:
    whole = mask(start=start, n=500, share=share)
    for at in (1, 39, 40, 41, 130, 499):
        parts = (
            mask(start=start, n=at, share=share),
            mask(start=start + at, n=500 - at, share=share),
        )
        assert torch.cat(parts).tolist() == whole.tolist()


def test_an_index_beyond_32_bits_begins_no_repetition() -> None:
    near = mask() * 2 - 1
    for start in (2**32, 2**34):
        far = mask(start=start) * 2 - 1
        assert abs(float((near * far).sum())) < 5 * math.sqrt(M)
        assert abs(int((far > 0).sum()) - M / 2) < 5 * math.sqrt(M) / 2


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0 - 2**-40, 4096), (2**-40, 0)])
def test_shares_next_to_none_and_all(share: float, count: int) -> None:
    assert int(mask(n=4096, share=share).sum()) == count


def test_a_mask_never_changes_between_versions() -> None:
    # a byte of the (i // 8)-th word of PCG64DXSM, then 23 bits mixed from i: with integers
    key = randomness.Key(3 << 100 | 5, 7 << 90 | 1, 11 << 32 | 13)
    factor = 0xDA942042E4DD58B5

    def word(place: int) -> int:
        state, power, rise, step = key.state, factor, key.increment, place
        while step:  # `place` steps of state = factor * state + increment, by doubling
            if step % 2:
                state = (power * state + rise) % 2**128
            power, rise, step = power**2 % 2**128, (power + 1) * rise % 2**128, step // 2
        high, low = state >> 64, state % 2**64 | 1
        high ^= high >> 32
        high = high * factor % 2**64
        high ^= high >> 48
        return high * low % 2**64

    def mixed(i: int) -> int:
        low = (i + 13) % 2**32
        low ^= low >> 17
        low = (low * 0xED5AD4BB + 11 + (i >> 32)) % 2**32
        low ^= low >> 11
        low = low * 0xAC4C1B51 % 2**32
        low ^= low >> 15
        low = low * 0x31848BAB % 2**32
        return low ^ low >> 14

    def bits(i: int) -> int:
        byte = word(i // 8) >> 8 * (i % 8) & 0xFF
        return byte * 2**23 + mixed(i) % 2**23

    n = 4096  # of which 16 need the lower bits where one limit is given
    for start in (1, 2**32 - 2046, 2**34 - 2047):
        numbers = [bits(i) for i in range(start, start + n)]
        for share in (0.5, 0.3):
            expected = [float(number < round(share * 2**31)) for number in numbers]
            assert mask(key, start=start, n=n, share=share).tolist() == expected
        for more in (0, 1):  # an element stays below a limit just above its number, not at it
            limits = np.array(numbers, dtype=np.int32) + np.int32(more)
            kept = randomness.keep_below(key, start, n, limits)
            assert kept.tolist() == [more] * n


# --- deltas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_delta_leaves_the_bits_of_the_base(zero: float) -> None:
    base = torch.tensor([0.0, -0.0, 1.0, -1e-45])
    merged = deltas.add_base(base, torch.full((4,), zero))
    assert merged.view(torch.int32).tolist() == base.view(torch.int32).tolist()


def test_the_base_is_added_to_a_delta() -> None:
    assert deltas.add_base(torch.tensor([1.0]), torch.tensor([0.5])).tolist() == [1.5]


@pytest.mark.parametrize(
    ("weights", "normalize", "lambda_", "sole"),
    [
        ((1.0,), False, 1.0, 0),
        ((0.0, 1.0), False, 1.0, 1),
        ((0.0, 0.3), True, 1.0, 1),
        ((0.0, -0.3), True, 1.0, 1),
        ((0.5,), False, 2.0, 0),
        ((0.5,), False, 1.0, None),
        ((1e-9,), True, 1.0, None),
        ((1.0, 1.0), True, 1.0, None),
        ((1.0, 1.0), False, 0.0, -1),
        ((0.0, 0.0), True, 1.0, -1),
    ],
)
def test_a_model_is_heard_alone_where_its_factor_is_1(
    weights: tuple[float, ...], normalize: bool, lambda_: float, sole: int | None
) -> None:
    assert deltas.sole_model(weights, normalize, lambda_) == sole


# --- cells, signs, spheres ----------------------------------------------------------------------


def test_sums_over_cells_do_not_depend_on_the_blocks() -> None:
    values = torch.randn(3 * CELL + 5, generator=torch.Generator().manual_seed(0))
    whole = cells.l1_norms([values])
    parts = [cells.l1_norms([part]) for part in values.split(2 * CELL)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.shape == (4, 1)
    exact = math.fsum(abs(x) for x in values.tolist())
    assert cells.totals(whole) == [pytest.approx(exact, rel=1e-9)]


def test_a_total_is_exact() -> None:
    rows = torch.tensor([[1e100], [1.0], [-1e100]], dtype=torch.float64)
    assert cells.totals(rows) == [1.0]


@pytest.mark.parametrize(
    ("whole", "part", "factor"),
    [(6.0, 3.0, 2.0), (6.0, 0.0, 1.0), (1e-8, 1e-9, 1.0), (math.inf, math.inf, 1.0)],
)
def test_a_norm_is_restored_unless_it_vanishes(whole: float, part: float, factor: float) -> None:
    assert cells.restoring_factor(whole, part) == factor


@pytest.mark.parametrize("normalize", [True, False])
def test_the_disjoint_merge_is_its_plain_form(normalize: bool) -> None:
    _, *rows = vectors(4, 4096, dtype=torch.float32)
    weights = (1.0, 0.5, 0.25, -0.5)
    plain = signs.reference_disjoint_merge([row.double() for row in rows], weights, normalize)
    scratch = torch.full((signs.ROWS, 4096), torch.nan)
    merged = signs.disjoint_merge(torch.stack(rows), weights, normalize, scratch)
    torch.testing.assert_close(merged.double(), plain, rtol=1e-6, atol=1e-6)


def test_equal_vectors_are_a_line_however_short() -> None:
    assert spheres.arc_weights(0.25, (1e-24, 1e-24), 1e-24) == (0.75, 0.25, True)
    assert spheres.arc_weights(0.25, (0.0, 0.0), 0.0) == (0.75, 0.25, True)
    assert not spheres.arc_weights(0.25, (1.0, 1.0), 0.5).straight
