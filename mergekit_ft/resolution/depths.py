"""What a config says of its layers, said anew for a stack of other layers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mergekit_ft.sources.ties import TEXT_CONFIGS

Config = Mapping[str, Any]
COUNTS = re.compile(
    r"(?:num_(?:hidden_|decoder_|encoder_)?layers|n_layers?|(?:en|de)coder_layers|depth"
    r"|(?:num_|n_)blocks|num_transformer_layers)"
)
NOT_BY_LAYER = re.compile(  # lists that may be as long as there are layers, and are of others
    r"architectures|.*_token_ids?|.*tokens?|mrope_section|.*_factor|.*_shape|.*_sizes?|.*kernels?"
    r"|.*strides?|.*labels?|dilat.*|suppress_tokens|.*_dims?|.*_grid.*|.*_mean|.*_std"
)
INDICES = re.compile(r".*(?:layers|layer_ids|indices|_idxs?|_index)")  # lists of layer numbers
PERIODS = {  # every n-th layer is of another kind; whether its tensors are others too
    "sliding_window_pattern": False,
    "global_attn_every_n_layers": False,
    "no_rope_layer_interval": False,
    "full_attention_interval": True,
    "decoder_sparse_step": True,
    "encoder_sparse_step": True,
    "interleave_moe_layer_step": True,
    "attn_layer_period": True,
    "expert_layer_period": True,
}
STARTS = {"first_k_dense_replace": True, "max_window_layers": False}  # the first n are others
LAST = ("num_kv_shared_layers",)  # the last n read what earlier ones keep
NAMED = ("layer_types", "layers_block_type", "no_rope_layers")  # by which periods are said already
SCALED = ("scale_attn_by_inverse_layer_idx",)  # by the layer's number


@dataclass
class Depths:
    """The edits of a config, what should be known of them, and what cannot be said right."""

    edits: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def declared(config: Config, held: int, words: Sequence[str] = ()) -> int:
    """Return how many layers of a stack are the model's; more may be held to predict further."""
    found = [value for _, value in _counts(config, words)]
    return held if not found or found[0] < 1 else min(held, found[0])


def depths(
    config: Config, held: int, origins: Sequence[tuple[Config, int, int]], words: Sequence[str]
) -> Depths:
    """Return what a config must say of a stack.

    `origins` give, for each output layer, the config of its first model, the layer in it, and how
    many that has. `words` tell apart the parts of a config where a model has several stacks.
    """
    found = Depths()
    layers, counts = declared(config, held, words), dict(_counts(config, words))
    keys = [key for key, value in counts.items() if value == layers]
    if not keys and len(origins) != layers and config:
        found.faults.append(
            f"no key of its config.json (num_hidden_layers, n_layer, ...) counts its {layers} "
            "layers, so that of the output cannot be said"
        )
    found.edits |= {key: len(origins) for key in keys if len(origins) != layers}
    same = [number for _, number, _ in origins] == list(range(layers))
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in keys):
        _of_part(prefix, config, layers, origins, same, found)
    return found


def speaks(config: Config) -> bool:
    """Say whether a config tells kinds of layers apart, so that their tensors may differ."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    words = {*NAMED, *PERIODS, *STARTS}
    return any(
        key in words or (isinstance(value, list) and value and INDICES.fullmatch(key))
        for part in parts
        for key, value in part.items()
    )


def _counts(config: Config, words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the keys that count layers, by dotted path, the most telling first."""
    inner = [key for key in config if key.endswith("_config") or key in TEXT_CONFIGS]
    parts = [("", config), *((f"{key}.", config[key]) for key in inner)]
    found = [
        (prefix + key, value)
        for prefix, part in parts
        if isinstance(part, Mapping)
        for key, value in part.items()
        if type(value) is int and COUNTS.fullmatch(key)
    ]
    if not words:
        yield from found
        return
    others = [word for word in _SIDES if word not in words]
    mine = [item for item in found if any(word in item[0] for word in words)]
    plain = [item for item in found if not any(word in item[0] for word in others)]
    yield from mine or plain


_SIDES = ("decoder", "text", "language", "llm", "vision", "audio")


def _part(config: Config, prefix: str) -> Config:
    part = config.get(prefix, {}) if prefix else config
    return part if isinstance(part, Mapping) else {}


def _of_part(
    prefix: str,
    config: Config,
    layers: int,
    origins: Sequence[tuple[Config, int, int]],
    same: bool,
    found: Depths,
) -> None:
    """Say anew what one part of a config says of its layers."""
    part, dot = _part(config, prefix), f"{prefix}." if prefix else ""
    taken = [(_part(other, prefix), number, count) for other, number, count in origins]
    for key, value in part.items():
        new = _said(key, value, part, layers, taken)
        if new is not None and new != value:
            found.edits[dot + key] = new
    if same:
        return
    for key, structural in PERIODS.items():
        moved = _out_of_step(part, key, [number for _, number, _ in taken])
        if moved is not None:
            _tell(found, dot + key, part[key], moved, structural)
    for key, structural in STARTS.items():
        _begin(found, dot + key, part.get(key), [n for _, n, _ in taken], structural, part)
    for key in (*LAST, *SCALED):
        if part.get(key):
            found.notes.append(
                f"{dot}{key}: {json.dumps(part[key])} stays, and goes by layer numbers, which are "
                "others now"
            )


def _said(
    key: str,
    value: Any,
    part: Config,
    layers: int,
    taken: Sequence[tuple[Config, int, int]],
) -> Any:
    """Return a list that speaks of each layer for the output's layers; None for other values."""
    if not isinstance(value, list | str) or NOT_BY_LAYER.fullmatch(key) or not value:
        return None
    if isinstance(value, str):
        return _text(key, value, layers, taken)
    if _are_indices(key, value, layers):
        return [i for i, (other, n, _) in enumerate(taken) if n in other.get(key, value)]
    if len(value) != layers:
        return None
    return [_at(other.get(key), value, n, count) for other, n, count in taken]


def _text(key: str, value: str, layers: int, taken: Sequence[tuple[Config, int, int]]) -> Any:
    """Return a pattern with one letter for each layer."""
    if not key.endswith("_pattern") or len(value) != layers:
        return None
    return "".join(_at(other.get(key), value, n, count) for other, n, count in taken)


def _at(own: Any, value: Any, number: int, count: int) -> Any:
    held = own if isinstance(own, type(value)) and len(own) == count else value
    return held[number] if number < len(held) else held[-1]


def _are_indices(key: str, value: list[Any], layers: int) -> bool:
    """Say whether a list holds layer numbers, and not something of each layer."""
    numbers = all(type(item) is int and 0 <= item < layers for item in value)
    rising = numbers and all(a < b for a, b in pairwise(value))
    return bool(INDICES.fullmatch(key)) and rising


def _out_of_step(part: Config, key: str, numbers: Sequence[int]) -> list[int] | None:
    """Return the output layers that a period takes for another kind than they were."""
    period = part.get(key)
    if type(period) is not int or period < 2 or (any(n in part for n in NAMED)):
        return None
    moved = [i for i, number in enumerate(numbers) if i % period != number % period]
    return moved or None


def _begin(
    found: Depths,
    key: str,
    value: Any,
    numbers: Sequence[int],
    structural: bool,
    part: Config,
) -> None:
    """Count anew the layers at the start that are of another kind."""
    if type(value) is not int or (not structural and not part.get("use_sliding_window")):
        return
    kinds = [number < value for number in numbers]
    count = sum(kinds)
    if kinds == [True] * count + [False] * (len(kinds) - count):
        if count != value and (structural or value < len(kinds)):
            found.edits[key] = count
        return
    moved = [i for i, kind in enumerate(kinds) if kind != (i < value)]
    _tell(found, key, value, moved, structural)


def _tell(found: Depths, key: str, value: Any, moved: Sequence[int], structural: bool) -> None:
    shown = ", ".join(map(str, moved[:6])) + (" ..." if len(moved) > 6 else "")
    said = f"{key}: {value} takes output layers {shown} for another kind than they were"
    if structural:
        found.faults.append(f"{said}, and their tensors differ by it; stack whole periods")
    else:
        found.notes.append(f"{said}; stack whole periods to keep it")
