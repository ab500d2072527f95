"""Mixtures of experts: a tiny Mixtral, whose experts lie apart on disk, and the same fused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from tests.checkpoints import VOCABULARY, WIDTH, save, write_checkpoint
from tests.peers.peer import tensors_of

EXPERTS = 2


def tiny_mixtral(
    folder: Path,
    seed: int = 0,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
) -> Path:
    """Write a random Mixtral as transformers does: each expert's matrices apart."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=EXPERTS)
    return save(MixtralForCausalLM(config), folder, dtype, shards)


def fused_mixtral(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, layers: int = 2
) -> Path:
    """Write one with its experts fused, as the peer writes it, and as it computes on it."""
    apart = tiny_mixtral(folder.with_name(f"{folder.name}-apart"), dtype=dtype, layers=layers)
    config = json.loads((apart / "config.json").read_text())
    return write_checkpoint(folder, fused(tensors_of(apart)), shards=shards, config=config)


def fused(apart: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a Mixtral's tensors under the names that the peer writes."""
    made = {}
    for name, tensor in apart.items():
        new = name.replace("block_sparse_moe", "mlp")
        if not (hit := re.fullmatch(r"(.*\.experts)\.0\.w1\.weight", name)):
            made |= {} if ".experts." in name else {new: tensor}
            continue
        matrices = [[apart[f"{hit[1]}.{e}.w{i}.weight"] for e in range(EXPERTS)] for i in (1, 2, 3)]
        stem, (w1, w2, w3) = hit[1].replace("block_sparse_moe", "mlp"), matrices
        both = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        made |= {f"{stem}.gate_up_proj": torch.stack(both), f"{stem}.down_proj": torch.stack(w2)}
    return made
