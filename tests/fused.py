"""A small model, two experts of it, and their tasks' rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tuned import model_of, rows, small_base

TASKS = {
    "sums": [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(4) for b in range(5)],
    "words": [
        {"prompt": f"say {w}", "completion": w[::-1]}
        for w in ("one", "two", "six", "ten", "red", "sun", "map", "cup", "fig", "oak")
    ],
}


def family(folder: Path, **options: Any) -> dict[str, Any]:
    """Write base, sums, words and their rows; return a plan of a fit."""
    base = small_base(folder / "base", **options)
    for seed, name in enumerate(TASKS):
        expert(base, folder / name, seed)
        rows(folder, TASKS[name], f"{name}.jsonl")
    return {
        "base": str(base),
        "experts": {name: str(folder / name) for name in TASKS},
        "calibration": {
            "data": {name: str(folder / f"{name}.jsonl") for name in TASKS},
            "rows": "raw",
            "positions": 60,
            "max_length": 64,
        },
    }


def expert(base: Path, out: Path, seed: int, scale: float = 0.02) -> Path:
    """Write the base moved at random: its weights' dtype and tokenizer stay."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    dice = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=dice)
            parameter.add_((scale * noise).to(parameter.dtype))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


__all__ = ["TASKS", "expert", "family", "model_of", "rows"]
