"""Checkpoints to measure on: random weights in the shape of a Llama."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY = 1024, 2816, 22, 24_576  # 0.29e9 parameters


def shapes(layers: int = LAYERS) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's name and shape."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for part in ("q", "k", "v", "o"):
            yield f"{at}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_model(folder: Path, seed: int, layers: int = LAYERS) -> Path:
    """Write a bfloat16 checkpoint: one base for every seed, plus a small delta of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(layers):
        values = torch.randn(shape, generator=base).mul_(0.02)
        if seed:
            values.add_(torch.randn(shape, generator=own), alpha=0.002)
        tensors[name] = values.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(layers)))
    return folder


def config(layers: int = LAYERS) -> dict[str, object]:
    """Return the config of such a checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
