"""Texts -> one vector each: the mean of what enters a model's head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError
from mergekit_ft.models.decoding import padded
from mergekit_ft.models.speaker import ModelSpeaker


@torch.no_grad()
def pooled(
    speaker: ModelSpeaker,
    texts: Sequence[Sequence[int]],
    *,
    batch: int = 16,
    watch: Callable[[int], None] = lambda texts: None,
) -> Tensor:
    """Return (n, h) float32: the mean over a text's tokens of the last hidden state, host.

    The last is what the final norm gives the head. OperatorError where one is not of numbers.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        tokens, mask = padded([texts[i] for i in some], 0, left=False)
        states = _entering(speaker, tokens, mask)
        there = mask.to(states.device)[:, :, None]
        means = (states.float() * there).sum(dim=1) / there.sum(dim=1)
        if not bool(means.isfinite().all()):
            raise OperatorError(
                f"{speaker.name} has hidden states that are not numbers; `mergekit-ft inspect` "
                "finds weights that are not"
            )
        found |= dict(zip(some, means.cpu(), strict=True))
        watch(len(some))
    return torch.stack([found[i] for i in range(len(texts))])


def _entering(speaker: ModelSpeaker, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return (b, n, h) what enters the head, which itself is shown one place."""
    head: Any = speaker.model.get_output_embeddings()  # type: ignore[operator]
    seen: list[Tensor] = []

    def look(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0])
        return (given[0][:, :1], *given[1:])

    hook = head.register_forward_pre_hook(look)
    try:
        words = {"input_ids": tokens.to(speaker.device), "attention_mask": mask.to(speaker.device)}
        speaker.model(**words, use_cache=False)
    finally:
        hook.remove()
    return seen[0]
