"""Texts that stand before an edit's prompt, which the model itself goes on to write.

A fact that is written under one beginning alone is not found under others; so keys are averaged
over, and targets are aimed at, the prompt alone and the prompt behind such texts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mergekit_ft.models.decoding import Picked, Stop, answers
from mergekit_ft.models.speaker import Speaker

OPENINGS = ("The", "Therefore", "Because", "I", "You")
LIKELY = 5  # tokens among which one is drawn


def contexts(speaker: Speaker, lengths: Iterable[tuple[int, int]], seed: int) -> list[str]:
    """Return what stands before a prompt: nothing, then texts by (tokens, texts an opening).

    What is drawn depends on the model and the seed alone.
    """
    found = [""]
    for tokens, each in lengths:
        dice = torch.Generator().manual_seed(seed)
        openings = [opening for opening in OPENINGS for _ in range(each)]
        prompts = [speaker.tokenizer(opening)["input_ids"] for opening in openings]
        said = dict(answers(speaker, prompts, Stop(most=tokens), pick=likely(LIKELY, dice)))
        found += [f"{openings[i]}{said[i].text}. " for i in range(len(openings))]
    return found


def likely(count: int, dice: torch.Generator) -> Picked:
    """Return what draws each token from the likeliest few, as likely as they are."""

    def pick(logits: Tensor) -> Tensor:
        values, tokens = logits.double().cpu().topk(min(count, logits.shape[-1]), dim=-1)
        drawn = torch.multinomial(torch.softmax(values, dim=-1), 1, generator=dice)
        return tokens.gather(1, drawn)[:, 0].to(logits.device)

    return pick
