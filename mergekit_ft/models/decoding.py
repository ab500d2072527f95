"""Greedy decoding of many prompts at once, with a stated rule for where an answer ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ft.errors import SourceError
from mergekit_ft.models.speaker import Speaker

Ended = Literal["token", "string", "length"]
Picked = Callable[[Tensor], Tensor]  # (b, vocabulary) logits -> (b,) tokens


@dataclass(frozen=True)
class Stop:
    """Where an answer ends: at a token that ends it, before one of these strings, or cut."""

    strings: tuple[str, ...] = ()
    most: int = 32  # tokens


@dataclass(frozen=True)
class Answer:
    """What was said after a prompt."""

    tokens: tuple[int, ...]  # all that were made, one that ended it included
    text: str  # up to what ended it, special tokens left out
    ended: Ended


def greedy(logits: Tensor) -> Tensor:
    """Return the likeliest token of each row; of equal ones the lowest."""
    return logits.argmax(dim=-1)


def sampled(temperature: float, dice: torch.Generator) -> Picked:
    """Return what draws tokens from softmax(logits / temperature)."""

    def pick(logits: Tensor) -> Tensor:
        chances = torch.softmax(logits.double().cpu() / temperature, dim=-1)
        return torch.multinomial(chances, 1, generator=dice)[:, 0].to(logits.device)

    return pick


def answers(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    stop: Stop,
    *,
    batch: int = 16,
    pick: Picked = greedy,
) -> Iterator[tuple[int, Answer]]:
    """Yield the answer to each prompt, by its place; longest prompts first.

    An answer does not depend on the prompts beside it but by the rounding of products. SourceError
    where a prompt is empty or leaves no room for the answer.
    """
    for i, prompt in enumerate(prompts):
        _require_room(speaker, i, prompt, stop)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        yield from _batch(speaker, places, [prompts[i] for i in places], stop, pick)


def _require_room(speaker: Speaker, i: int, prompt: Sequence[int], stop: Stop) -> None:
    if not prompt:
        raise SourceError(f"prompt {i + 1}: no token to go on from; write some text")
    if speaker.most is not None and len(prompt) + stop.most > speaker.most:
        raise SourceError(
            f"prompt {i + 1}: {len(prompt)} tokens and an answer of {stop.most} do not fit into "
            f"the model's {speaker.most}; shorten one"
        )


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return (b, n) tokens and their mask, filled up on one side."""
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, at] = torch.tensor(row)
        mask[i, at] = 1
    return tokens, mask


def _batch(
    speaker: Speaker,
    places: list[int],
    prompts: list[Sequence[int]],
    stop: Stop,
    pick: Picked,
) -> Iterator[tuple[int, Answer]]:
    """Yield the answers to a batch, each when it ends; its row leaves the batch then."""
    said: list[list[int]] = [[] for _ in places]
    rows = list(range(len(places)))  # of the batch that still speak
    logits, state = speaker.begin(*padded(prompts, _pad(speaker.tokenizer), left=True))
    while True:
        chosen = pick(logits)
        going: list[int] = []
        for at, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            said[row].append(token)
            answer = _ended(speaker, said[row], stop)
            if answer is None:
                going.append(at)
            else:
                yield places[row], answer
        if not going:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going)
            state, rows = speaker.keep(state, kept), [rows[at] for at in going]
            chosen = chosen[kept.to(chosen.device)]
        logits, state = speaker.step(state, chosen)


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def _ended(speaker: Speaker, said: list[int], stop: Stop) -> Answer | None:
    """Return the answer where its last token ended it."""
    if said[-1] in speaker.ends:
        return Answer(tuple(said), _text(speaker.tokenizer, said[:-1]), "token")
    if stop.strings:
        text = _text(speaker.tokenizer, said)
        found = [at for at in (text.find(s) for s in stop.strings) if at >= 0]
        if found:
            return Answer(tuple(said), text[: min(found)], "string")
    if len(said) < stop.most:
        return None
    return Answer(tuple(said), _text(speaker.tokenizer, said), "length")


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text
