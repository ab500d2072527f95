"""The adapter_config.json of what is written: ranks, targets, and a scale of 1 everywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from mergekit_ft.sources import Source

CAUSAL = ("ForCausalLM", "LMHeadModel")


def config_words(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    revision: str | None = None,
    saved: Collection[str] = (),
    biased: bool = False,
    transposed: bool = False,
    task: str | None = None,
    others: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the config of an adapter whose modules have these ranks.

    alpha is the rank of each module, so the scale is 1: for one who goes by `rank_pattern` and
    `alpha_pattern`, and for one who knows `r` and `lora_alpha` alone. `others` are the model's
    modules that it does not change, which no short name may stand for; None where they are unknown.
    """
    usual = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    pattern = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets(ranks, others),
        "modules_to_save": sorted(saved) or None,
        "bias": "all" if biased else "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def targets(changed: Collection[str], others: Collection[str] | None) -> list[str]:
    """Return the last words of the modules' names, where those mean no others; else whole names."""
    last = {name.rpartition(".")[2] for name in changed}
    if others is None or any(name.rpartition(".")[2] in last for name in others):
        return sorted(changed)
    return sorted(last)


def task_type(source: Source) -> str | None:
    """Return what peft calls a model's task, where that adds nothing to the adapter."""
    named = str((source.config.get("architectures") or [""])[0])
    if named.endswith(CAUSAL):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if source.config.get("is_encoder_decoder") else None


def by_number(name: str) -> list[tuple[int, str]]:
    """Return what puts layer 10 after layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
