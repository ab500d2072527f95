"""The output's config.json, and what the configs of two models disagree on."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_ft.checkpoint.json_text import edited
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.ties import TEXT_CONFIGS, tie_word_embeddings

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution
    from mergekit_ft.sources import Source

DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*")([^"\\]*)(?=")')
_MEANING = """
architectures model_type auto_map is_decoder is_encoder_decoder rope_theta rope_type
rope_local_base_freq rotary_pct rotary_emb_base rotary_dim partial_rotary_factor
original_max_position_embeddings factor long_factor short_factor low_freq_factor high_freq_factor
attention_factor beta_fast beta_slow mscale mscale_all_dim mrope_section max_position_embeddings
n_positions position_embedding_type alibi no_rope_layers rms_norm_eps layer_norm_eps
layer_norm_epsilon norm_epsilon norm_eps tie_encoder_decoder vocab_size type_vocab_size hidden_act
hidden_activation activation_function dense_act_fn feed_forward_proj is_gated_act
num_attention_heads num_key_value_heads num_heads n_head n_heads head_dim d_kv hidden_size n_embd
d_model intermediate_size num_hidden_layers n_layer num_layers sliding_window use_sliding_window
max_window_layers layer_types sliding_window_pattern attention_bias attention_multiplier
query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling
embedding_multiplier residual_multiplier scale_attn_weights scale_attn_by_inverse_layer_idx
parallel_attn use_parallel_residual qk_norm num_experts num_local_experts n_routed_experts
num_experts_per_tok norm_topk_prob routed_scaling_factor relative_attention_num_buckets
relative_attention_max_distance num_labels problem_type scale_embedding
"""
MEANING = frozenset(_MEANING.split())  # keys on which it depends what the same weights compute
USUAL = {  # what a config means that does not say
    "rope_theta": 10000.0,
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "num_labels": 2,
    "sliding_window": None,
}
Config = Mapping[str, Any]
ROPE = ("rope_parameters", "rope_scaling")  # one thing under a new and an old name


def config_bytes(resolution: Resolution) -> bytes | None:
    """Return the donor's config.json with the merge's edits and the dtype that it stores."""
    folder = resolution.donor.folder
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    wanted, edits = resolution.plan.stored_dtype, resolution.edits
    text = edited(raw.decode("utf-8"), edits) if wanted or edits else ""
    return (_with_dtype(text, wanted) if wanted else text).encode() if text else raw


def differences(donor: Source, other: Source, besides: Collection[str] = ()) -> list[str]:
    """Say on which keys that give weights their meaning, some besides, two configs disagree."""
    mine, theirs = map(dict, map(_meaning, _comparable(donor.config, other.config)))
    if donor.config and other.config:  # the default where a config is silent
        mine["tie_word_embeddings"] = tie_word_embeddings(donor.config)
        theirs["tie_word_embeddings"] = tie_word_embeddings(other.config)
    found = []
    for key in dict.fromkeys([*mine, *theirs] if mine and theirs else []):
        word = key.rpartition(".")[2]
        usual = USUAL.get(word, mine.get(key, theirs.get(key)))  # silence agrees with what is said
        if word not in besides and mine.get(key, usual) != theirs.get(key, usual):
            found.append(
                f"{key}: {_said(mine, key)} in {donor.reference}, "
                f"{_said(theirs, key)} in {other.reference}"
            )
    return found


def _comparable(one: Config, other: Config) -> tuple[Config, Config]:
    """Return two configs, of a larger model the part that speaks of text where it alone has one."""
    mine, theirs = _text(one), _text(other)
    if (mine is None) == (theirs is None):
        return one, other
    return (one if mine is None else mine), (other if theirs is None else theirs)


def _text(config: Config) -> Config | None:
    parts = [config.get(key) for key in TEXT_CONFIGS]
    return next((part for part in parts if isinstance(part, dict)), None)


def _with_dtype(text: str, wanted: str) -> str:
    """Change the value of each key that speaks of the stored weights, and nothing else."""
    spans = [
        match.span(2)
        for match in DTYPE.finditer(text)
        if match[2].removeprefix("torch.") != wanted and _speaks_of_weights(text, match)
    ]
    for start, stop in reversed(spans):
        text = text[:start] + wanted + text[stop:]
    return text


def _speaks_of_weights(text: str, match: re.Match[str]) -> bool:
    """Say whether a key stands at the top, or at the top of the config of a part."""
    marked = text[: match.start(2)] + "\\u0000" + text[match.end(2) :]
    config = json.loads(marked.removeprefix("\ufeff"))
    parts = [part for key, part in config.items() if key.endswith("_config")]
    parts = [part for part in parts if isinstance(part, dict) and "quant_method" not in part]
    return any("\0" in (part.get("dtype"), part.get("torch_dtype")) for part in (config, *parts))


def _meaning(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys that matter by their path, rotary settings by their newer names."""
    for key, value in config.items():
        if key in ROPE:
            yield from _rotary(value, prefix)
        elif isinstance(value, dict) and key.endswith("_config") and "quant" not in key:
            yield from _meaning(value, f"{prefix}{key}.")
        elif key in MEANING:
            yield prefix + key, value


def _rotary(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in (value or {}).items() if isinstance(value, dict | None) else ():
        if isinstance(inner, dict):  # a set for each kind of layer
            yield from _rotary(inner, f"{prefix}{key}.")
        else:
            yield prefix + ("rope_type" if key == "type" else key), inner


def _said(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else "not given"
