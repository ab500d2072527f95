"""Samples -> rectangles of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_ft.data.rows import UNSCORED, Sample

Groups = list[tuple[Sample, ...]]  # what a training step draws from


class Collator:
    """Pads samples on the right into one batch; a pair's two samples come together."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, groups: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels (rows, length) and weights (rows,)."""
        samples = [sample for group in groups for sample in group]
        length = max(len(sample.tokens) for sample in samples)
        tokens = torch.full((len(samples), length), self.pad)
        labels = torch.full((len(samples), length), UNSCORED)
        attention = torch.zeros(len(samples), length, dtype=torch.long)
        for row, sample in enumerate(samples):
            end = len(sample.tokens)
            tokens[row, :end] = torch.tensor(sample.tokens)
            labels[row, :end] = torch.tensor(sample.labels)
            attention[row, :end] = 1
        weights = torch.tensor([sample.weight for sample in samples])
        return {
            "input_ids": tokens,
            "attention_mask": attention,
            "labels": labels,
            "weights": weights,
        }


def grouped(samples: Sequence[Sample], pairs: bool) -> Groups:
    """Return what a training step draws: single samples, or pairs."""
    if not pairs:
        return [(sample,) for sample in samples]
    return [(samples[i], samples[i + 1]) for i in range(0, len(samples), 2)]


def batches(
    groups: Sequence[Sequence[Sample]], size: int, collator: Collator
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of so many groups, in order."""
    for start in range(0, len(groups), size):
        yield collator(groups[start : start + size])
