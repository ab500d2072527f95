"""Tied weights: which names stand for one tensor, by config and by the names present."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_ft.sources.header import TensorInfo

SHARED = re.compile(r"(?P<stem>(?:[\w.]+\.)?)shared\.weight")  # of an encoder and a decoder
SIDES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEADS = tuple(  # the input embedding -> the heads that are tied to it
    (re.compile(pattern), heads)
    for pattern, heads in (
        (r"(?P<stem>(?:[\w.]+\.)?)model\.embed_tokens\.weight", ("{stem}lm_head.weight",)),
        (r"model\.(language_model|text_model)\.embed_tokens\.weight", ("lm_head.weight",)),
        (r"(?:model\.)?(?:[\w.]+\.)?shared\.weight", ("lm_head.weight",)),
        (r"embed_tokens\.weight", ("lm_head.weight",)),
        (r"(?:model\.)?decoder\.embed_tokens\.weight", ("lm_head.weight", "proj_out.weight")),
        (r"(?:transformer\.)?(wte|word_embeddings|tokens_embed)\.weight", ("lm_head.weight",)),
        (r"transformer\.w\.weight", ("lm_head.weight",)),
        (r"(?:gpt_neox\w*\.)?embed_in\.weight", ("lm_head.weight", "embed_out.weight")),
        (r"backbone\.embeddings\.weight", ("lm_head.weight",)),
        (r"(?:biogpt|model\.decoder)\.embed_tokens\.weight", ("output_projection.weight",)),
    )
)
MASKED = re.compile(r"(?:\w+\.)?embeddings\.(word|tok)_embeddings\.weight")
MASKED_HEADS = (  # each stands only where its module has another tensor, such as a bias
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "predictions.decoder.weight",
    "generator_lm_head.weight",
    "vocab_projector.weight",
    "decoder.weight",
)
BIASES = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
    "predictions.decoder.bias": "predictions.bias",
}
TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "decoder")
_UNTIED = """
afmoe apertus arcee aria aria_text bamba bitnet chameleon codegen cwm dbrx deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 emu3 emu3_text_model esmc eurobert
exaone4 exaone4_5 exaone_moe falcon_h1 fast_vlm flex_olmo fsmt fuyu git glm glm4 glm46v
glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm_image glm_moe_dsa glm_ocr gpt_neox
gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
hunyuan_v1_moe hyperclovax idefics idefics2 idefics3 internlm3 jais2 jamba kimi_linear llama
llama4 llama4_text llava llava_next llava_next_video llava_onevision longcat_flash mamba2
minimax minimax_m2 ministral ministral3 mistral mistral4 mixtral mllama_text_model molmo2
molmo2_text moshi nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon
phi phi3 phi4_multimodal phimoe qwen2 qwen2_5_omni_thinker qwen2_5_vl qwen2_moe qwen2_vl qwen3
qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_thinker
qwen3_vl qwen3_vl_moe reformer rembert rwkv seed_oss shieldgemma2 smolvlm solar_open stablelm
step3p5 video_llama_3 video_llava vipllava xlstm
"""
UNTIED = frozenset(_UNTIED.split())  # model types that do not tie where their config is silent


def ties(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Map each name that is tied to the tensor it is tied to; the name may be absent."""
    found = _sides(tensors)
    found.update({name: to for name, to in BIASES.items() if to in tensors})
    if config and tie_word_embeddings(config):  # without a config every tensor is its own
        found.update(_heads(tensors, found))
    return {name: to for name, to in found.items() if _fits(tensors, name, to)}


def tie_word_embeddings(config: Mapping[str, Any]) -> bool:
    """Say whether a config ties the head to the input embedding; its default where it is silent."""
    texts = [config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)]
    for part in (config, *texts):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    speaking = next((part for part in texts if "model_type" in part), config)
    return speaking.get("model_type") not in UNTIED


def _sides(tensors: Iterable[str]) -> dict[str, str]:
    """Tie both sides of an encoder-decoder to its shared embedding."""
    found = {}
    for name in tensors:
        match = SHARED.fullmatch(name) if name.endswith("shared.weight") else None
        if match:
            found.update({match["stem"] + side: name for side in SIDES})
    return found


def _heads(tensors: Mapping[str, TensorInfo], sides: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in tensors:
        if not name.endswith(".weight") or "layers." in name or name in sides:
            continue
        for pattern, heads in HEADS:
            match = pattern.fullmatch(name)
            if match:
                stem = match.groupdict().get("stem") or ""
                found.update({head.format(stem=stem): name for head in heads})
        if MASKED.fullmatch(name):
            found.update({head: name for head in MASKED_HEADS if _has_module(tensors, head)})
    return found


def _has_module(tensors: Iterable[str], head: str) -> bool:
    """Say whether a head's module has any tensor: a tied head's own weight is often absent."""
    parts = head.split(".")
    prefix = ".".join(parts[: max(1, len(parts) - 2)]) + "."
    return any(name.startswith(prefix) for name in tensors)


def _fits(tensors: Mapping[str, TensorInfo], name: str, to: str) -> bool:
    return name != to and (name not in tensors or tensors[name].shape == tensors[to].shape)
