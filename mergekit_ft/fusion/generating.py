"""Fused models asked for answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ft.data.rows import Encoder, Row
from mergekit_ft.errors import PlanError
from mergekit_ft.fusion.opening import FusedModels
from mergekit_ft.fusion.translating import Shown
from mergekit_ft.models.decoding import Answer, Picked, Stop, answers, greedy, sampled

Shots = Literal["all", "base"]


@dataclass(frozen=True)
class Generated:
    """What was said after a prompt, and what moved it."""

    prompt: str
    answer: Answer
    factors: tuple[Mapping[str, float], ...] = field(default=())  # by token; experts at 0 left out

    def report(self, *, factors: bool) -> dict[str, Any]:
        """Return it for JSON."""
        told = {"prompt": self.prompt, "answer": self.answer.text, "ended": self.answer.ended}
        tokens = {"tokens": len(self.answer.tokens)}
        return {**told, **tokens, **({"factors": list(self.factors)} if factors else {})}


def generate(
    models: FusedModels,
    prompts: Sequence[str],
    *,
    rows: str = "auto",
    stop: Sequence[str] = (),
    max_new_tokens: int = 128,
    batch: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    shots: Sequence[Row] = (),
    shown: Shots = "all",
) -> Iterator[Generated]:
    """Yield what fused models say after each prompt, in order.

    Greedy at temperature 0, else drawn, by `seed`. `shots`, rows of prompt and completion, stand
    before each prompt, for all models or for the base alone.
    """
    if temperature < 0:
        raise PlanError(f"temperature {temperature:g}: 0, for the likeliest token, or more")
    encoder = Encoder(models.tokenizer, rows, 1 << 30)
    short = [encoder.prompt(prompt) for prompt in prompts]
    long = [encoder.prompt(prompt, shots) for prompt in prompts] if shots else short
    alone = bool(shots) and shown == "base"
    table = dict(zip(short, long, strict=True))
    pad = int(models.tokenizer.pad_token_id or 0)
    more: dict[str, Any] = {"shown": lambda speaker: Shown(speaker, table, pad)} if alone else {}
    told = _Told()
    speaker = models.open(heard=told.hear, **more)
    told.names = speaker.names
    pick: Picked = greedy
    if temperature:
        pick = sampled(temperature, torch.Generator().manual_seed(seed))
    wanted = Stop(tuple(stop), max_new_tokens)
    tokens = short if alone else long
    for start in range(0, len(tokens), batch):
        some = range(start, min(start + batch, len(tokens)))
        order = sorted(some, key=lambda i: -len(tokens[i]))  # as rows of a batch stand
        told.begin(len(order))
        found = dict(answers(speaker, [tokens[i] for i in order], wanted, batch=batch, pick=pick))
        made = {
            i: Generated(prompts[i], found[row], tuple(told.rows[row]))
            for row, i in enumerate(order)
        }
        yield from (made[i] for i in some)


class _Told:
    """Keeps the factors of each token of a batch."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.rows: list[list[Mapping[str, float]]] = []

    def begin(self, count: int) -> None:
        self.rows = [[] for _ in range(count)]

    def hear(self, rows: Tensor, factors: Tensor) -> None:
        for row, found in zip(rows.tolist(), factors.tolist(), strict=True):
            moved = {n: round(a, 6) for n, a in zip(self.names, found, strict=True) if a}
            self.rows[row].append(moved)
