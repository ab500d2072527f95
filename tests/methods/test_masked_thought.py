"""Scored tokens are hidden, more of them with time."""

from __future__ import annotations

import pytest
import torch

from mergekit_ft import registry


def test_masked_thought_hides_scored_tokens_alone_and_more_of_them_with_time() -> None:
    method = registry.of_kind("masked_thought", "objective")(share=0.5, warmup=0.5)
    method = method.fitted(100, set(range(99)))
    tokens = torch.arange(4000).reshape(40, 100) % 99
    labels = tokens.clone()
    labels[:, :50] = -100
    batch = {"input_ids": tokens, "labels": labels}
    shares = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        shown = method.corrupted(batch, progress, torch.Generator().manual_seed(0))["input_ids"]
        hidden = shown == 99
        assert not bool(hidden[:, :50].any())
        assert torch.equal(shown[~hidden], tokens[~hidden])
        shares.append(float(hidden[:, 50:].float().mean()))
    assert shares[0] == 0 and shares == sorted(shares)
    assert shares[1] == pytest.approx(0.25, abs=0.03) and shares[3] == pytest.approx(0.5, abs=0.03)


def test_masked_thought_needs_an_id_that_the_data_do_not_use() -> None:
    method = registry.of_kind("masked_thought", "objective")()
    with pytest.raises(ValueError, match="name `token:`"):
        method.fitted(3, {0, 1, 2})
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        registry.of_kind("masked_thought", "objective")(token=9).fitted(9, set())
