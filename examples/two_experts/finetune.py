"""Fine-tune a checkpoint on one task: a plain loop, loss on the answers only."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.two_experts.fetch import SHARD_SIZE, save
from examples.two_experts.folders import made_whole
from examples.two_experts.items import DATA, Batch, Example, pad, predict, task_examples


@dataclass(frozen=True)
class Recipe:
    """Say how an expert is made; the numbers are ours."""

    steps: int = 40
    batch: int = 8  # items a step
    rate: float = 5e-5  # the peak, after a tenth of the steps; then a cosine to 0
    seed: int = 0
    shard_size: str = SHARD_SIZE


def finetune(base: Path, task: str, out: Path, recipe: Recipe, say: Callable[[str], None]) -> bool:
    """Write an expert to `out`; give False where it is there already, made from the same things."""
    stamp = json.dumps({"task": task, "data": _digest(task), **asdict(recipe)}, indent=2)
    mark = out / "recipe.json"
    if mark.exists() and mark.read_text(encoding="utf-8") == stamp:
        return False
    with made_whole(out) as part:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        train(model, task_examples(task, "train", tokenizer), recipe, say)
        save(model.to(torch.bfloat16), tokenizer, part, recipe.shard_size)
        (part / mark.name).write_text(stamp, encoding="utf-8")
    return True


def _digest(task: str) -> str:
    return hashlib.sha256((DATA / f"{task}.train.jsonl").read_bytes()).hexdigest()


def train(model: Any, examples: list[Example], recipe: Recipe, say: Callable[[str], None]) -> None:
    """Change the model in place; weights are float32 throughout."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, recipe.steps))
    for step, batch in enumerate(draw(examples, recipe), start=1):
        logits, answers = predict(model, batch)
        loss = cross_entropy(logits, answers)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0 or step == recipe.steps:
            say(f"step {step} of {recipe.steps}, loss {loss.item():.3f}")


def pace(step: int, steps: int) -> float:
    """Give the share of the peak rate: a line up for a tenth of the steps, then a cosine to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def draw(examples: list[Example], recipe: Recipe) -> Iterator[Batch]:
    """Deal the examples in a new order each epoch until the steps are done."""
    dice = random.Random(recipe.seed)
    hand: list[Example] = []
    for _ in range(recipe.steps):
        if len(hand) < recipe.batch:
            hand = dice.sample(examples, len(examples))
        yield pad(hand[: recipe.batch])
        hand = hand[recipe.batch :]
