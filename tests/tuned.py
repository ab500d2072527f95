"""A small model, small data, and a training of it that is recorded and can be repeated by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.data.batches import Collator
from mergekit_ft.tuning import tune

Batch = dict[str, Tensor]
Weights = dict[str, Tensor]
ROWS = [  # 24: six batches of four
    {"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a in range(6) for b in range(4)
]


def small_base(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random Llama of two layers, with its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(folder: Path, found: list[dict[str, Any]] = ROWS, name: str = "rows.jsonl") -> Path:
    """Write rows of JSONL."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def plan(folder: Path, tuner: Any, *, objective: Any = "sft", **training: Any) -> dict[str, Any]:
    """Return a plan of a few steps in float32."""
    base, data = folder / "base", folder / "rows.jsonl"
    if not base.exists():
        small_base(base)
    if not data.exists():
        rows(folder)
    usual = {"steps": 6, "batch": 4, "learning_rate": 1e-3, "precision": "float32"}
    usual |= {"warmup": 0, "schedule": "constant", "clip": 0.0}
    return {
        "base": str(base),
        "data": {"train": str(data), "rows": "raw"},
        "tuner": tuner,
        "objective": objective,
        "output": "full",
        "training": usual | training,
    }


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Return the batches that a training draws, in order."""
    seen: list[Batch] = []
    collate = Collator.__call__

    def spy(self: Collator, groups: Any) -> Batch:
        batch = collate(self, groups)
        seen.append({key: value.clone() for key, value in batch.items()})
        return batch

    monkeypatch.setattr(Collator, "__call__", spy)
    return seen


def trained(words: dict[str, Any], out: Path) -> dict[str, Tensor]:
    """Return the weights that a plan makes."""
    tune(words, out)
    return load_file(out / "model.safetensors")


def model_of(folder: Path) -> Any:
    """Return the model in a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def mean_loss(model: Any, group: list[Batch]) -> Tensor:
    """Return the loss over the scored tokens of some batches, plainly."""
    total, count = torch.zeros(()), 0
    for batch in group:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        logs = torch.log_softmax(logits[:, :-1].float(), -1)
        for row in range(len(labels)):
            for at in range(labels.shape[1]):
                if labels[row, at] != -100:
                    total = total - logs[row, at, labels[row, at]]
                    count += 1
    return total / count


def steps(seen: list[Batch], accumulation: int = 1) -> Iterator[list[Batch]]:
    """Yield the batches of each step."""
    for start in range(0, len(seen), accumulation):
        yield seen[start : start + accumulation]


def weights(model: Any) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: Any, group: list[Batch]) -> Weights:
    model.zero_grad()
    mean_loss(model, group).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class DenseAdamW:
    """AdamW as Loshchilov & Hutter write it, over whole tensors, masked where it is asked to be."""

    def __init__(self, masks: Weights, rate: float, decay: float = 0.0, b2: float = 0.999) -> None:
        self.masks, self.rate, self.decay, self.b2, self.t = masks, rate, decay, b2, 0
        self.m = {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in masks.items()}
        self.v = {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in masks.items()}

    @torch.no_grad()
    def step(self, model: Any, found: Weights) -> None:
        self.t += 1
        held = dict(model.named_parameters())
        for name, mask in self.masks.items():
            g = found[name]
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = self.b2 * self.v[name] + (1 - self.b2) * g * g
            mean = self.m[name] / (1 - 0.9**self.t)
            root = (self.v[name] / (1 - self.b2**self.t)).sqrt()
            decay = self.decay if held[name].dim() > 1 else 0.0
            moved = held[name] - self.rate * (mean / (root + 1e-8) + decay * held[name])
            held[name].copy_(torch.where(mask, moved, held[name]))


def everywhere(model: Any) -> Weights:
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
