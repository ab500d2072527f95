"""Tiny random checkpoints of six architectures: a base and three models tuned from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import checkpoints
from tests.peers import mixtures

STEP = 0.5  # standard deviation of a delta, in that of the weights
LEAST = 0.02  # where all weights are equal: biases, norms


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
    peer_architecture: str | None  # what the peer is told, where its own definition fails


def _bert(class_name: str, folder: Path, *, shards: int, dtype: torch.dtype, layers: int) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=checkpoints.VOCABULARY,
        hidden_size=checkpoints.WIDTH,
        intermediate_size=2 * checkpoints.WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = getattr(transformers, class_name)(config).to(dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // shards + 1)
    return folder


_LLAMA = Words("self_attn", "mlp", "layernorm")
_BERT = Words("attention.self", "intermediate", "LayerNorm")
_T5 = Words("Attention", "DenseReluDense", "layer_norm")
_MIXTURE = Words("self_attn", "experts", "layernorm")
_GATED_T5 = partial(checkpoints.tiny_t5, feed_forward_proj="gated-gelu")
INFERRED = "UnknownToThePeer"  # such an architecture it infers from the tensors

# Where the peer's own definition does not serve (test_architectures.py), it is made to infer one.
BUILDERS: dict[str, tuple[Callable[..., Path], Words, str | None]] = {
    "llama": (checkpoints.tiny_llama, _LLAMA, None),
    "qwen2": (checkpoints.tiny_qwen2, _LLAMA, None),
    "gpt2": (checkpoints.tiny_gpt2, Words("attn", "mlp", "ln_"), None),
    "bert_classifier": (partial(_bert, "BertForSequenceClassification"), _BERT, None),
    "bert_masked_lm": (checkpoints.tiny_bert, _BERT, INFERRED),
    "bert_encoder": (partial(_bert, "BertModel"), _BERT, INFERRED),
    "t5_gated": (_GATED_T5, _T5, None),
    "t5": (checkpoints.tiny_t5, _T5, INFERRED),
    "mixtral": (mixtures.fused_mixtral, _MIXTURE, None),
    "mixtral_apart": (mixtures.tiny_mixtral, _MIXTURE, None),
}
APART = ("bert_encoder", "mixtral_apart")  # the peer merges none, or under other names
MERGED = [name for name in BUILDERS if name not in APART]


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
    first, second, third = (str(_tune(base, folder / f"tuned{i}", seed=i)) for i in (1, 2, 3))
    return Family(name, str(base), (first, second, third), words, told)


def _tune(base: Path, folder: Path, seed: int) -> Path:
    """Copy a checkpoint and add random deltas."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(seed)
    for file in sorted(folder.glob("*.safetensors")):
        tuned = {name: _moved(tensor, noise) for name, tensor in load_file(file).items()}
        save_file(tuned, file, metadata={"format": "pt"})
    return folder


def _moved(weights: Tensor, noise: torch.Generator) -> Tensor:
    step = STEP * max(float(weights.double().std()), LEAST)
    delta = torch.randn(weights.shape, generator=noise, dtype=torch.float64)
    return (weights.double() + step * delta).to(weights.dtype)
