"""FP8 checkpoints: which scale belongs to which weight, and what its shape means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.dtypes import BY_NAME, FLOATING
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.refusals import WAY_OUT, quantisations, refuse_packed
from mergekit_ft.sources.source import Source
from mergekit_ft.sources.ties import TEXT_CONFIGS

F8 = frozenset({"F8_E4M3", "F8_E5M2"})
ENDINGS = ("_scale_inv", "_scale")  # both are multiplied with, whatever their name says
OF_ACTIVATIONS = re.compile(  # of what runs through the model, not of its weights
    r".+[._](input|output|activation|k|v|q|kv)_scale(_ub)?"
)
COMPANION = re.compile(r"(?P<weight>.+\.weight)_(?P<word>\w+)")
DEFAULT = "BF16"  # what a model is stored in whose config names no dtype
FLOAT_FORMATS = ("float-quantized", "naive-quantized")
STATED = (
    "F32"  # what a dequantised tensor is computed in, so that nothing is rounded before a merge
)


@dataclass(frozen=True)
class Scheme:
    """What a config says of the scales of its FP8 weights."""

    method: str
    blocks: tuple[tuple[int, int], ...] = ()  # rows and columns that one scale is for
    tensor: bool = True  # one scale may stand for a whole tensor
    channel: bool = True  # and one for a row


@dataclass(frozen=True)
class Scaled:
    """A weight, its scale, and the rows and columns that one scale is for."""

    weight: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]


def readable(source: Source) -> Source:
    """Return a source whose tensors mean what they say: FP8 dequantised as it is read.

    Every other quantisation is refused by name.
    """
    stated = dict(quantisations(source.config))
    schemes = {_scheme(source.reference, words) for words in stated.values()}
    if not schemes:
        refuse_packed(source.reference, source)
        return source
    if len(schemes) > 1:
        raise _refusal(source.reference, "in two ways", f"its config says {' and '.join(stated)}")
    scheme = schemes.pop()
    refuse_packed(source.reference, source, f8=True)
    scaled = {found.weight.name: found for found in _pairs(source, scheme)}
    _require_all(source, scheme, scaled)
    return _dequantised(source, scheme, scaled, stated)


def _scheme(reference: str, words: Any) -> Scheme:
    """Return what one `quantization_config` says, or refuse it."""
    words = words if isinstance(words, dict) else {"quant_method": words}
    method = str(words.get("quant_method") or "an unnamed method")
    if method == "fp8":
        return _fine_grained(reference, words)
    if method == "fbgemm_fp8":
        return Scheme(method, tensor=False)
    if method == "compressed-tensors":
        return _compressed(reference, words)
    raise _refusal(reference, method)


def _fine_grained(reference: str, words: Mapping[str, Any]) -> Scheme:
    if words.get("expert_dtype", "fp8") != "fp8":
        raise _refusal(reference, f"fp8 with experts in {words['expert_dtype']}")
    block = words.get("weight_block_size")
    if block is None:
        return Scheme("fp8")
    return Scheme("fp8", (_block(reference, "fp8", block),), tensor=False, channel=False)


def _compressed(reference: str, words: Mapping[str, Any]) -> Scheme:
    method, form = "compressed-tensors", words.get("format")
    if form not in FLOAT_FORMATS:
        raise _refusal(reference, f"{method}, {form or 'of no named format'}")
    sparsity = words.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense" or words.get("transform_config"):
        raise _refusal(reference, f"{method}, sparse or transformed")
    groups = words.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refusal(reference, method, "it has no config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    known = [_strategy(reference, found) for found in weights if found]
    if not known or len(weights) != len(groups):
        raise _refusal(reference, method, "its config_groups name no weights")
    blocks = tuple(sorted({block for _, block in known if block}))
    strategies = {strategy for strategy, _ in known}
    return Scheme(method, blocks, "tensor" in strategies, "channel" in strategies)


def _strategy(reference: str, weights: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """Return the strategy of a group of modules, and its block if it has one."""
    kind, bits = weights.get("type"), weights.get("num_bits")
    said = f"compressed-tensors, {kind} of {bits} bits"
    if kind != "float" or bits != 8 or weights.get("symmetric") is False:
        raise _refusal(reference, said)
    strategy = weights.get("strategy")
    if strategy in ("tensor", "channel"):
        return strategy, None
    if strategy == "block":
        return strategy, _block(reference, said, weights.get("block_structure"))
    raise _refusal(reference, f"{said}, a scale for each {strategy}")


def _block(reference: str, method: str, words: Any) -> tuple[int, int]:
    if isinstance(words, list) and len(words) == 2:
        rows, columns = words
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return rows, columns
    raise _refusal(reference, method, f"its blocks are {words!r}, not two numbers")


def _refusal(reference: str, method: str, why: str = "") -> SourceError:
    why = f": {why}" if why else ""
    return SourceError(
        f"{reference}: quantised ({method}, by its config.json), which cannot be merged as it "
        f"is{why}: {WAY_OUT}"
    )


def _pairs(source: Source, scheme: Scheme) -> Iterator[Scaled]:
    """Yield each FP8 weight that has a scale, with what the scale's shape means."""
    for name, info in source.items():
        ending = next((end for end in ENDINGS if name.endswith(end)), None)
        weight = source.get(name.removesuffix(ending)) if ending else None
        if weight is None:
            _require_known(source, name)
        elif weight.dtype in F8:
            yield Scaled(weight, info, _meaning(source, scheme, weight, info))
        elif weight.name.endswith("weight"):
            raise SourceError(
                f"{source.reference}: {name} is a scale, but {weight.name} is {weight.dtype}, not "
                f"FP8: is the checkpoint whole? {WAY_OUT}"
            )


def _require_known(source: Source, name: str) -> None:
    """Refuse what stands beside a weight and is no scale of it, and a scale without a weight."""
    match = COMPANION.fullmatch(name)
    if match is None or OF_ACTIVATIONS.fullmatch(name):
        return
    if match["weight"] not in source:
        raise SourceError(
            f"{source.reference}: {name} belongs to {match['weight']}, which is missing: fetch or "
            "save the checkpoint again"
        )
    if source[match["weight"]].dtype in F8:
        raise SourceError(
            f"{source.reference}: quantised, and {name} is not known: without it "
            f"{match['weight']} may mean something else: {WAY_OUT}"
        )


def _meaning(
    source: Source, scheme: Scheme, weight: TensorInfo, scale: TensorInfo
) -> tuple[int, int]:
    """Return the rows and columns that one scale is for, from the scheme and both shapes."""
    if scale.dtype not in FLOATING:
        raise SourceError(f"{source.reference}: {scale.name} is {scale.dtype}, which is no scale")
    rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (1, weight.numel)
    lead = weight.shape[:-2]
    if scheme.channel and scale.shape in ((*lead, rows, 1), (*lead, rows)) and rows > 1:
        return 1, columns
    if scheme.tensor and scale.numel == prod(lead) and scale.shape[: len(lead)] == lead:
        return rows, columns
    for block in scheme.blocks:
        if scale.shape == (*lead, -(-rows // block[0]), -(-columns // block[1])):
            return block
    raise SourceError(
        f"{source.reference}: {scale.name} has shape {list(scale.shape)}, which is no scale of "
        f"{weight.name} {list(weight.shape)} {_wanted(scheme)}: fetch or save the checkpoint again"
    )


def _wanted(scheme: Scheme) -> str:
    kinds = ["per tensor"] * scheme.tensor + ["per channel"] * scheme.channel
    kinds += [f"per block of {rows}x{columns}" for rows, columns in scheme.blocks]
    return " or ".join(kinds)


def _require_all(source: Source, scheme: Scheme, scaled: Mapping[str, Scaled]) -> None:
    """Require a scale, and one alone, for every FP8 tensor."""
    narrow = [name for name, info in source.items() if info.dtype in F8]
    narrow = [name for name in narrow if not OF_ACTIVATIONS.fullmatch(name)]
    if not narrow:
        raise SourceError(
            f"{source.reference}: quantised ({scheme.method}, by its config.json), but none of its "
            "tensors is FP8: remove quantization_config from its config.json if it was dequantised"
        )
    bare = [name for name in narrow if name not in scaled]
    if bare:
        raise SourceError(
            f"{source.reference}: FP8 without a scale: {listed(bare)}: fetch or save the "
            "checkpoint again"
        )
    twice = [name for name in narrow if all(name + end in source for end in ENDINGS)]
    if twice:
        raise SourceError(
            f"{source.reference}: {twice[0]} has two scales, {twice[0]}_scale_inv and "
            f"{twice[0]}_scale: remove the one that does not belong"
        )


def _dequantised(
    source: Source, scheme: Scheme, scaled: Mapping[str, Scaled], stated: Mapping[str, Any]
) -> Source:
    from mergekit_ft.sources.dequantised import reader

    scales = {found.scale.name for found in scaled.values()}
    idle = [name for name in source if OF_ACTIVATIONS.fullmatch(name) and name not in scales]
    gone, kept = scales.union(idle), _dtype(source.config)
    tensors = [
        replace(info, dtype=STATED, nbytes=info.numel * 4, stored=kept) if name in scaled else info
        for name, info in source.items()
        if name not in gone
    ]
    notes = [
        f"{source.reference}: {len(scaled)} FP8 tensors are dequantised as they are read "
        f"({scheme.method}, {_wanted(scheme)}; their scales are used up), and count as {kept}"
    ]
    if idle:
        notes.append(
            f"{source.reference}: {len(idle)} scales of activations mean nothing without FP8 and "
            f"are left out ({listed(idle)})"
        )
    edits = dict.fromkeys(stated)
    return derived(source, tensors, reader(source, scaled), edits=edits, notes=notes)


def _dtype(config: Mapping[str, Any]) -> str:
    """Return the code of the dtype that a config names for its weights."""
    texts = [config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)]
    for part in (config, *texts):
        for key in ("dtype", "torch_dtype"):
            code = BY_NAME.get(str(part.get(key)).removeprefix("torch."))
            if code in FLOATING - F8:
                return str(code)
    return DEFAULT
