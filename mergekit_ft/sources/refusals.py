"""Checkpoints that would give garbage if they were read as they are, refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.header import TensorInfo

PACKED = {  # how a tensor's name ends -> who packs weights so
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".W_q": "HQQ",
}
ENDINGS = tuple(PACKED)
NARROW = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})
SCALES = ("_scale", "_scale_inv", "_scales", "_scale_2")
WAY_OUT = "name the checkpoint it was quantised from, or dequantise it first"


def refuse_packed(reference: str, tensors: Mapping[str, TensorInfo], *, f8: bool = False) -> None:
    """Refuse weights that mean nothing without their scales; `f8`: but those of FP8 are known."""
    narrow = NARROW - {"F8_E4M3", "F8_E5M2"} if f8 else NARROW
    for name, info in tensors.items():
        if name.endswith(ENDINGS):
            packer = next(who for end, who in PACKED.items() if name.endswith(end))
            raise SourceError(
                f"{reference}: quantised ({packer}, by its tensor {name!r}), which cannot be "
                f"merged as it is: {WAY_OUT}"
            )
        scale = _scale(name, tensors) if info.dtype in narrow else None
        if scale:
            raise SourceError(
                f"{reference}: quantised ({name!r} is {info.dtype} and counts only with its scale "
                f"{scale!r}), which cannot be merged as it is: {WAY_OUT}"
            )


def quantisations(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a config says of quantisation, by dotted key."""
    inner = {f"{key}.": part for key, part in config.items() if isinstance(part, dict)}
    for prefix, part in ({"": config} | inner).items():
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                yield prefix + key, part[key]


def _scale(name: str, tensors: Collection[str]) -> str | None:
    """Return the companion that scales a tensor, if it has one."""
    module = name.removesuffix("weight")
    candidates = [name + end for end in SCALES]
    if module != name:
        candidates += [f"{module}scale", f"{module}scales", f"{module}scale_weight"]
    if name.endswith("_blocks"):
        candidates.append(name.removesuffix("_blocks") + "_scales")
    return next((scale for scale in candidates if scale in tensors), None)


def refuse_no_weights(where: str, names: Collection[str], base: str | None) -> SourceError:
    """Say why a folder without weights cannot be a source."""
    if "adapter_config.json" in names:
        of = f" for {base}" if base else ""
        return SourceError(
            f"{where}: holds an adapter{of}, not a model: write {base or 'BASE'}+{where}, or "
            "`adapter:` beside its base's `model:`"
        )
    other = next((name for name in sorted(names) if name.endswith((".gguf", ".h5"))), None)
    if other:
        return SourceError(
            f"{where}: holds no safetensors weights, and {other} cannot be read: name the "
            "checkpoint it was converted from"
        )
    return SourceError(
        f"{where}: holds no weights (no model.safetensors, index or shards): is it the folder that "
        "save_pretrained wrote?"
    )
