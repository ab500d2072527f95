"""Arcee Fusion: take over the elements whose importance is far above the median."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ft.contract import CELL
from mergekit_ft.methods.arcee_fusion import ArceeFusion, arcee_fusion
from tests.merging import Case, vectors


def test_in_one_row_what_changed_most_is_taken_over() -> None:
    # one row has one divergence, so the changes 0, 1, 1, 2, 9 stand for the importances: ranks
    # 1, 2, 3 of five are 1, 1, 2, and the threshold is 1 + 1.5 = 2.5
    a, b = [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, -1.0, 2.0, 9.0]
    assert Case(ArceeFusion(), a, b).values().tolist() == [0.0, 0.0, 0.0, 0.0, 9.0]


def test_the_quartiles_lie_at_the_rank_that_is_cut_off() -> None:
    # of 4 changes 1, 2, 3, 8 ranks trunc(.75), trunc(1.5), trunc(2.25) are 1, 2, 3: 2 + 1.5 * 2 = 5
    assert Case(ArceeFusion(), [0.0] * 4, [8.0, -2.0, 3.0, 1.0]).values().tolist() == [8.0, 0, 0, 0]


def test_a_row_that_diverges_more_counts_for_more() -> None:
    # each row's softmax moves from (1/2, 1/2): KL = ln 2 - H(p)
    def divergence(x: float) -> float:
        p = 1 / (1 + math.exp(-x))
        return p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))

    changes = [0.5, 0.6, 0.7, 4.0]  # in the first of two elements
    scores = sorted([x * divergence(x) for x in changes] + [0.0] * 4)
    threshold = scores[3] + 1.5 * (scores[5] - scores[1])
    a, b = torch.zeros(4, 2), torch.tensor([[x, 0.0] for x in changes])
    values = Case(ArceeFusion(), a, b, shape=(4, 2)).values().view(4, 2)
    kept = [x if x * divergence(x) >= threshold else 0.0 for x in changes]
    assert values[:, 0].tolist() == pytest.approx(kept)
    assert 0 < sum(x > 0 for x in kept) < 4


def test_a_shift_of_a_whole_row_is_no_divergence() -> None:
    # softmax does not see it: the importances of both rows are 0, and nothing is below 0
    a, b = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert Case(ArceeFusion(), a, b, shape=(2, 2)).values().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_equal_models_come_out_bit_for_bit() -> None:
    same = torch.tensor([1.5, -0.0, 0.0, -2.3])
    for shape in ((4,), (2, 2)):
        values = Case(ArceeFusion(), same, same, shape=shape).values()
        assert torch.equal(values.view(torch.int32), same.view(torch.int32))


def test_every_element_is_the_bases_or_the_models_bit_for_bit() -> None:
    rolls = torch.Generator().manual_seed(0)
    base = torch.randn(CELL, generator=rolls)
    tuned = base + 0.1 * torch.randn(CELL, generator=rolls)
    values = Case(ArceeFusion(), base, tuned, shape=(256, 256)).values()
    assert bool(((values == base) | (values == tuned)).all())
    assert 0.02 < float((values == tuned).float().mean()) < 0.2


def test_the_three_quartiles_share_one_working_out_of_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worked_out = []
    plain = arcee_fusion._divergence
    counted = lambda *rows: worked_out.append(1) or plain(*rows)  # noqa: E731
    monkeypatch.setattr(arcee_fusion, "_divergence", counted)
    case = Case(ArceeFusion(), *vectors(1, 8))
    (block,) = case.blocks()
    measures = next(case.operator.survey(case.about))
    assert len(measures) == 4  # and the rows' divergences, which the merge is given
    for measure in measures:
        measure.of(block)
    assert len(worked_out) == 1


@pytest.mark.parametrize("shape", [(2 * CELL // 256 + 7, 256), (3, 400, 100), (CELL + 100,)])
def test_blocks_merge_to_the_float64_reference(shape: tuple[int, ...]) -> None:
    base, tuned = vectors(1, math.prod(shape))
    case = Case(ArceeFusion(), base, base + tuned / 8, shape=shape)
    torch.testing.assert_close(case.values().double(), case.reference(), rtol=0, atol=0)


def test_divergences_that_were_kept_give_what_working_them_out_again_gives() -> None:
    rolls = torch.Generator().manual_seed(0)
    base = torch.randn(CELL, generator=rolls)
    tuned = base + 0.1 * torch.randn(CELL, generator=rolls)
    case = Case(ArceeFusion(), base, tuned, shape=(256, 256))
    (block,) = case.blocks()
    kept = arcee_fusion._diverging(block)[:, 0].numpy()
    threshold = float(block.scratch[0].quantile(0.9))
    found = [arcee_fusion.Found(threshold, rows) for rows in (kept, None)]
    given, again = (case.operator.merge(next(iter(case.blocks())), each).clone() for each in found)
    assert len(kept) == 256
    assert torch.equal(given, again)
