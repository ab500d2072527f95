"""Measure a checkpoint on both tasks and on neutral text."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.two_experts.items import (
    TASKS,
    Example,
    batched,
    neutral_examples,
    predict,
    task_examples,
)


@dataclass(frozen=True)
class Score:
    """Hold what was measured on some texts."""

    loss: float  # nats a scored token
    exact: float  # share of items whose every scored token is the likeliest one

    def beats(self, other: "Score") -> bool:
        """Say whether both figures are better."""
        return self.loss < other.loss and self.exact > other.exact


@dataclass(frozen=True)
class Scores:
    """Hold all figures of one checkpoint."""

    tasks: dict[str, Score]
    neutral_loss: float  # nats a token


def evaluate(checkpoint: Path, limit: int | None = None) -> Scores:
    """Measure a checkpoint on the held-out items, or on the first `limit` of each kind."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    tasks = {
        task: score(model, task_examples(task, "heldout", tokenizer)[:limit]) for task in TASKS
    }
    return Scores(tasks, score(model, neutral_examples(tokenizer)[:limit]).loss)


@torch.inference_mode()
def score(model: Any, examples: list[Example]) -> Score:
    """Measure a model on some texts.

    An item is exact when each token of its answer, and the end of the turn, is the likeliest one
    after those before it: greedy decoding would then write just this answer.
    """
    nats, exact = 0.0, 0
    for batch in batched(examples, 16):
        logits, answers = predict(model, batch)
        nats += cross_entropy(logits, answers, reduction="sum").item()
        right = torch.split(logits.argmax(-1) == answers, batch.scored.sum(1).tolist())
        exact += sum(bool(item.all()) for item in right)
    return Score(nats / sum(example.scored for example in examples), exact / len(examples))


def main() -> None:
    """Print the figures of one checkpoint as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", type=Path)
    print(json.dumps(asdict(evaluate(parser.parse_args().checkpoint)), indent=2))


if __name__ == "__main__":
    main()
