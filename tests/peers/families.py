"""Tiny random checkpoints of five architectures: a base and three models tuned from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints

STEP = 0.01  # standard deviation of a delta; that of a weight is 0.02


class Words(NamedTuple):
    """Parts of tensor names that plans filter by."""

    attention: str
    feed_forward: str
    norm: str


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture on disk, as plans name them."""

    name: str
    base: str
    tuned: tuple[str, str, str]
    words: Words
    peer_architecture: str | None = None  # what the peer is told, where its own definition fails


def _bert_classifier(folder: Path, *, shards: int, dtype: torch.dtype, **config: Any) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    width = checkpoints.WIDTH
    settings = BertConfig(
        vocab_size=checkpoints.VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=config["layers"],
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = BertForSequenceClassification(settings).to(dtype).eval()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    limit = size + 1 if shards == 1 else size // shards + 1
    model.save_pretrained(folder, max_shard_size=limit)
    return folder


def _gated_t5(folder: Path, **options: Any) -> Path:
    return checkpoints.tiny_t5(folder, feed_forward_proj="gated-gelu", **options)


_LLAMA = Words("self_attn", "mlp", "layernorm")
_BERT = Words("attention.self", "intermediate", "LayerNorm")

# Builder, words, and what the peer is told. Its T5 demands the gated feed-forward of T5 v1.1. Its
# BertForMaskedLM demands a pooler that these models lack and drops cls.predictions.transform; an
# architecture that it does not know it infers from the tensors, which serves.
BUILDERS: dict[str, tuple[Callable[..., Path], Words, str | None]] = {
    "llama": (checkpoints.tiny_llama, _LLAMA, None),
    "qwen2": (checkpoints.tiny_qwen2, _LLAMA, None),
    "gpt2": (checkpoints.tiny_gpt2, Words("attn", "mlp", "ln_"), None),
    "bert_classifier": (_bert_classifier, _BERT, None),
    "bert": (checkpoints.tiny_bert, _BERT, "InferredFromTensors"),
    "t5": (_gated_t5, Words("Attention", "DenseReluDense", "layer_norm"), None),
}


def build(
    folder: Path,
    name: str,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    **config: Any,
) -> Family:
    """Write a base of random weights and three models that differ from it in every weight."""
    builder, words, told = BUILDERS[name]
    base = builder(folder / "base", shards=shards, dtype=dtype, layers=layers, **config)
    tuned = [_tune(base, folder / f"tuned{i}", seed=i) for i in (1, 2, 3)]
    return Family(name, str(base), (str(tuned[0]), str(tuned[1]), str(tuned[2])), words, told)


def _tune(base: Path, folder: Path, seed: int) -> Path:
    """Copy a checkpoint and add random deltas."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(seed)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            delta = STEP * torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
            tensors[name] = (tensor.double() + delta).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
