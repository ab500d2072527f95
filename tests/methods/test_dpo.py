"""Both answers' sums compared."""

from __future__ import annotations

import math

import pytest

from tests.spoken import places, said, total


def test_dpo_compares_the_sums_of_both_answers() -> None:
    words = said()
    gains = [0.0] * 4
    for i, (_, p, _, before) in enumerate(places(words)):
        gains[int(words.rows[i])] += math.log(p) - math.log(before[int(words.targets[i])])
    wanted = 0.0
    for weight, chosen, rejected in ((1.0, gains[0], gains[1]), (2.0, gains[2], gains[3])):
        wanted -= weight * math.log(1 / (1 + math.exp(-0.1 * (chosen - rejected))))
    assert total("dpo", words) == pytest.approx(wanted, rel=1e-9)
