"""The negative log-likelihood."""

from __future__ import annotations

import math

import pytest

from tests.spoken import places, said, total


def test_sft_is_the_negative_log_likelihood() -> None:
    words = said()
    wanted = sum(-w * math.log(p) for w, p, _, _ in places(words))
    assert total("sft", words) == pytest.approx(wanted, rel=1e-12)
