"""Small checkpoints for tests: written tensors and tiny random transformers models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, WIDTH, LAYERS = 96, 16, 2


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 1,
    index: bool = True,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors as safetensors in `shards` files of about equal count."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(_own(tensors), folder / "model.safetensors", metadata=metadata)
        return folder
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file(_own({name: tensors[name] for name in part}), folder / file, metadata=metadata)
        weight_map.update(dict.fromkeys(part, file))
    if index:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def save(model: Any, folder: Path, dtype: torch.dtype, shards: int) -> Path:
    """Save as transformers does; `shards` is how many files to aim at."""
    model = model.to(dtype).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size + 1 if shards == 1 else size // shards + 1)
    return folder


def tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    layers: int = LAYERS,
    **config: Any,
) -> Path:
    """Write a random Llama; its head is not tied unless asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return save(LlamaForCausalLM(LlamaConfig(**{**options, **config})), folder, dtype, shards)


def tiny_qwen2(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    layers: int = LAYERS,
    **config: Any,
) -> Path:
    """Write a random Qwen2 with a tied head, as its small models have."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return save(Qwen2ForCausalLM(Qwen2Config(**{**options, **config})), folder, dtype, shards)


def tiny_gpt2(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    layers: int = LAYERS,
    **config: Any,
) -> Path:
    """Write a random GPT-2: tied head, fused attention, transposed linear layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return save(GPT2LMHeadModel(GPT2Config(**{**options, **config})), folder, dtype, shards)


def tiny_bert(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    layers: int = LAYERS,
    **config: Any,
) -> Path:
    """Write a random BERT with its masked-language head."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return save(BertForMaskedLM(BertConfig(**{**options, **config})), folder, dtype, shards)


def tiny_t5(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    layers: int = LAYERS,
    **config: Any,
) -> Path:
    """Write a random T5: an encoder and a decoder over one embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 4,
        "d_ff": 2 * WIDTH,
        "num_layers": layers,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return save(
        T5ForConditionalGeneration(T5Config(**{**options, **config})), folder, dtype, shards
    )
