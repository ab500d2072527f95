"""The anchor is the KL over the whole vocabulary."""

from __future__ import annotations

import math

import pytest

from tests.spoken import kl, places, said, total


def test_the_anchor_is_the_kl_over_the_whole_vocabulary() -> None:
    words = said()
    wanted = sum(w * (-math.log(p) + 0.3 * kl(before, now)) for w, p, now, before in places(words))
    assert total("sft_kl", words, **{"lambda": 0.3}) == pytest.approx(wanted, rel=1e-12)
