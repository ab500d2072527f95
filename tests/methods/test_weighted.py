"""The exponent of the reward."""

from __future__ import annotations

import math

import pytest

from tests.spoken import places, said, total


def test_weighted_takes_the_exponent_of_the_reward() -> None:
    words = said()
    wanted = sum(-math.exp(w / 0.4) * math.log(p) for w, p, _, _ in places(words))
    assert total("weighted", words) == pytest.approx(wanted, rel=1e-12)
