"""Adapters of peft's SHiRA: entries of linear layers' weights, r (in + out) of them in each.

Where a layer changes fewer, the rest are written as zeros, at the lowest places that are free, so
that peft loads the file; read back, zeros are no entries.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.deltas.foreign import Foreign, Sparse, refuse_kinds, sums
from mergekit_ft.errors import SourceError
from mergekit_ft.layers import role_of
from mergekit_ft.sources.adapter import PREFIX, SAFE
from mergekit_ft.sources.adapter_config import NAME
from mergekit_ft.sources.delta_file import Change, DeltaFile

KINDS = {"add": "shira_weight", "replace": "shira_weight"}
WEIGHT, INDICES = ".shira_weight", ".shira_indices"


def read(path: Path) -> Foreign:
    """Return what an adapter adds."""
    config = _config(path)
    if config.get("fan_in_fan_out"):
        raise SourceError(f"{path}: fan_in_fan_out: its places are of a turned weight; unsupported")
    try:
        held = load_file(path / SAFE)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {SAFE} cannot be read: {error}") from None
    found = Foreign(str(path), parameters={"r": config.get("r")})
    rest = {name for name in held if not name.endswith((WEIGHT, INDICES))}
    if rest:
        raise SourceError(f"{path}: {sorted(rest)[0]} is no part of SHiRA that has a place here")
    for key in sorted(name for name in held if name.endswith(WEIGHT)):
        module = key.removeprefix(PREFIX).removesuffix(WEIGHT)
        places = held.get(key.removesuffix(WEIGHT) + INDICES)
        if places is None or places.shape != (2, len(held[key])):
            raise SourceError(
                f"{path}: {module} has no {INDICES[1:]} of its {len(held[key])} values"
            )
        found.added[f"{module}.weight"] = _entries(places, held[key])
    return found


def _entries(places: Tensor, values: Tensor) -> Sparse:
    """Return entries, as (row, column) pairs until a base gives the width."""
    kept = values != 0
    pairs = places[:, kept].long()
    return Sparse((pairs[0] << 32) | pairs[1], values[kept])


def flattened(foreign: Foreign, widths: dict[str, int]) -> Foreign:
    """Return the same with flat indices, the base's widths known."""
    for name, part in foreign.added.items():
        rows, columns = part.indices >> 32, part.indices & (2**32 - 1)
        flat, order = (rows * widths[name] + columns).sort()
        if len(columns) and int(columns.max()) >= widths[name]:
            raise SourceError(f"{foreign.reference}: {name}: a column is outside the base's weight")
        foreign.added[name] = Sparse(flat, part.values[order])
    return foreign


def _config(path: Path) -> dict[str, Any]:
    try:
        words = json.loads((path / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {NAME} cannot be read: {error}") from None
    if words.get("peft_type") != "SHIRA":
        raise SourceError(f"{path}: is an adapter of {words.get('peft_type')}, not of SHIRA")
    return dict(words)


def write(delta: DeltaFile, out: Path) -> int:
    """Write a delta as an adapter of the smallest rank that holds it; return its entries."""
    refuse_kinds(delta, KINDS, "SHiRA")
    parts = list(sums(delta))
    for change, _ in parts:
        _require_linear(delta, change)
    rank = max(math.ceil(len(part.indices) / sum(change.shape)) for change, part in parts)
    tensors: dict[str, Tensor] = {}
    for change, part in parts:
        module = change.name.removesuffix(".weight")
        indices, values = _padded(delta, change, part, rank)
        rows = torch.stack([indices // change.shape[1], indices % change.shape[1]])
        tensors[f"{PREFIX}{module}{WEIGHT}"] = values.float()
        tensors[f"{PREFIX}{module}{INDICES}"] = rows.int().contiguous()
    out.mkdir(parents=True)
    save_file(tensors, out / SAFE, {"format": "pt"})
    (out / NAME).write_text(json.dumps(_words(delta, parts, rank), indent=2) + "\n")
    return sum(len(part.indices) for _, part in parts)


def _words(delta: DeltaFile, parts: list[tuple[Change, Sparse]], rank: int) -> dict[str, Any]:
    return {
        "base_model_name_or_path": delta.words["base"].get("id"),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "random",
        "modules_to_save": None,
        "peft_type": "SHIRA",
        "r": rank,
        "random_seed": None,
        "revision": delta.words["base"].get("revision"),
        "target_modules": sorted(change.name.removesuffix(".weight") for change, _ in parts),
        "task_type": None,
    }


def _require_linear(delta: DeltaFile, change: Change) -> None:
    beside = role_of(change.name) in ("embedding", "norm")
    if len(change.shape) != 2 or not change.name.endswith(".weight") or beside:
        raise SourceError(
            f"{delta.reference}: {change.name} {list(change.shape)} is no linear layer's weight, "
            "and SHiRA changes no others; extract with --exclude, or keep the delta file"
        )


def _padded(delta: DeltaFile, change: Change, part: Sparse, rank: int) -> tuple[Tensor, Tensor]:
    """Return r (in + out) entries: the change's, and zeros at the lowest free places."""
    wanted = rank * sum(change.shape)
    if wanted > change.numel:
        raise SourceError(
            f"{delta.reference}: {change.name} would need {wanted} of its {change.numel} entries "
            f"at rank {rank}, which the fullest layer asks for: lower the density"
        )
    free = torch.ones(change.numel, dtype=torch.bool)
    free[part.indices] = False
    spare = free.nonzero().flatten()[: wanted - len(part.indices)]
    indices, order = torch.cat([part.indices, spare]).sort()
    zeros = torch.zeros(len(spare), dtype=part.values.dtype)
    return indices, torch.cat([part.values, zeros])[order]
