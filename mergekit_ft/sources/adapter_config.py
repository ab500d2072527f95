"""What an adapter_config.json says: the rank and the scale of each module, or why not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ft.errors import SourceError

NAME = "adapter_config.json"
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of `init_lora_weights`
DEPENDS = {  # keys under which no fixed weights are the adapted model, or none that we can make
    "alora_invocation_tokens": "is switched on by tokens (aLoRA), so no fixed weights are it",
    "arrow_config": "routes each token between adapters (Arrow), so no fixed weights are it",
    "kasa_config": "adds to a truncated base (KaSA)",
    "layer_replication": "repeats layers of its base: build the deeper model first, with `slices`",
    "megatron_config": "is of parallel layers (Megatron)",
    "monteclora_config": "samples its weights (MonteCLoRA)",
    "target_parameters": "changes parameters such as fused experts by position",
    "trainable_token_indices": "replaces single rows of the embedding",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "pools its inputs in groups (QA-LoRA)",
}
READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_bias",
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "base_model_name_or_path",
        "init_lora_weights",
    ]
)
WITHOUT_EFFECT = frozenset(  # of training, or said again by the tensors themselves
    [
        "auto_mapping",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    ]
)
WAY_OUT = "merge it into its base first (peft: merge_and_unload, save_pretrained)"


@dataclass(frozen=True)
class AdapterConfig:
    """What is said of an adapter's arithmetic."""

    where: str
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    biased: bool  # `lora_bias`
    transposed: bool  # `fan_in_fan_out`
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base: str | None  # what it was trained on

    def rank_of(self, module: str) -> int:
        """Return the rank of a module: of the first pattern that its name ends with, else `r`."""
        return int(_first(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return what B @ A is multiplied with: alpha / r, or alpha / sqrt(r) of rsLoRA."""
        rank = self.rank_of(module)
        alpha = _first(self.alphas, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.rslora else rank))


def read_config(words: Mapping[str, Any], where: str) -> AdapterConfig:
    """Return what a parsed adapter_config.json says, or refuse what cannot be done exactly."""
    where = f"{where}/{NAME}"
    _require_exact(words, where)
    rank, alpha = words.get("r", 8), words.get("lora_alpha", 8)
    _require_number(rank, where, "r", whole=True)
    _require_number(alpha, where, "lora_alpha")
    base = words.get("base_model_name_or_path")
    return AdapterConfig(
        where,
        rank,
        alpha,
        bool(words.get("use_rslora")),
        bool(words.get("use_dora")),
        bool(words.get("lora_bias")),
        bool(words.get("fan_in_fan_out")),
        _patterns(words, "rank_pattern", where, whole=True),
        _patterns(words, "alpha_pattern", where),
        base if isinstance(base, str) and base else None,
    )


def _require_exact(words: Mapping[str, Any], where: str) -> None:
    kind = words.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{where}: an adapter of type {kind}, where LORA can be read: {WAY_OUT}")
    for key, why in DEPENDS.items():
        if words.get(key):
            raise SourceError(f"{where}: the adapter {why} ({key}), which is not supported")
    start = str(words.get("init_lora_weights", True)).lower()
    if start.startswith(RESIDUAL):
        raise SourceError(
            f"{where}: init_lora_weights is {start}, which changed the base as training began, so "
            "on the base as it is published the adapter means something else: convert it (peft: "
            "save_pretrained with path_initial_model_for_weight_conversion), or save the merged "
            "model"
        )
    for key, value in words.items():
        if value and key not in READ and key not in WITHOUT_EFFECT:
            raise SourceError(
                f"{where}: '{key}' is not known and may change what the adapter computes: {WAY_OUT}"
            )


def _require_number(value: Any, where: str, key: str, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not math.isfinite(value) or (whole and value < 1):
        wanted = "a whole number from 1" if whole else "a number"
        raise SourceError(f"{where}: {key} is {value!r}, not {wanted}")


def _patterns(
    words: Mapping[str, Any], key: str, where: str, *, whole: bool = False
) -> dict[str, Any]:
    found = words.get(key) or {}
    if not isinstance(found, dict):
        raise SourceError(f"{where}: {key} is not a map from modules to numbers")
    for pattern, value in found.items():
        _require_number(value, where, f"{key}: {pattern}", whole=whole)
        try:
            re.compile(pattern)
        except re.error as error:
            raise SourceError(f"{where}: {key}: {pattern!r} is no pattern: {error}") from None
    return found


def _first(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    """Return the value of the first pattern that matches the end of a name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual
