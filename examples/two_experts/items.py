"""Read items, turn them into tokens, and run a model on the tokens that are scored."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
TASKS = ("orders", "triage")
TURN = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"  # ChatML, no system turn


class Example(NamedTuple):
    """Hold the tokens of one text and how many of them, at its end, are scored."""

    tokens: list[int]
    scored: int


class Batch(NamedTuple):
    """Hold examples as one rectangle, padded on the right."""

    tokens: Tensor  # (items, length)
    attention: Tensor  # (items, length), 1 where there is text
    scored: Tensor  # (items, length - 1), True where the *next* token is scored


def task_examples(task: str, split: str, tokenizer: Any) -> list[Example]:
    """Read one split of a task; the answer and the end of the turn are scored."""
    lines = (DATA / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [_turn_example(json.loads(line), tokenizer) for line in lines]


def _turn_example(item: dict[str, str], tokenizer: Any) -> Example:
    prompt = tokenizer(TURN.format(prompt=item["prompt"]), add_special_tokens=False)["input_ids"]
    answer = tokenizer(item["answer"], add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    return Example(prompt + answer, len(answer))


def neutral_examples(tokenizer: Any) -> list[Example]:
    """Read the neutral paragraphs; all tokens but the first of each are scored."""
    lines = (DATA / "neutral.txt").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    return [Example(tokens, len(tokens) - 1) for tokens in texts]


def batched(examples: Iterable[Example], size: int) -> Iterator[Batch]:
    """Cut examples into padded batches, in the order given."""
    rest = list(examples)
    for start in range(0, len(rest), size):
        yield pad(rest[start : start + size])


def pad(examples: list[Example]) -> Batch:
    """Make one rectangle of several examples."""
    length = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    scored = torch.zeros(len(examples), length - 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        end = len(example.tokens)
        tokens[row, :end] = torch.tensor(example.tokens)
        attention[row, :end] = 1
        scored[row, end - 1 - example.scored : end - 1] = True
    return Batch(tokens, attention, scored)


def predict(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Give the logits before each scored token and those tokens, item after item.

    The head, a fifth of a small model's work, runs on the scored places only.
    """
    with arithmetic():
        hidden = model.base_model(batch.tokens, attention_mask=batch.attention).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][batch.scored])  # (scored, vocabulary)
    return logits.float(), batch.tokens[:, 1:][batch.scored]


@contextmanager
def arithmetic() -> Iterator[None]:
    """Compute products in bfloat16 where the processor has instructions for it, else in float32."""
    able = torch.cpu.get_capabilities().get("avx512_bf16", False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(able)):
        yield
