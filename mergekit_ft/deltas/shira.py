"""SHiRA adapters of peft: of each linear layer as many entries as a LoRA of rank r has.

peft wants r * (in + out) entries of every layer, one r for all; a layer with fewer is filled up
with zeros where nothing changes. Only weights of nn.Linear can be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ft.deltas.moves import Move, added
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.adapter import PREFIX, SAFE, WRAPPED
from mergekit_ft.sources.adapter_config import NAME
from mergekit_ft.sources.layout import listed, read_json
from mergekit_ft.sources.raw import open_raw
from mergekit_ft.sources.skeleton import Skeleton, skeleton
from mergekit_ft.sources.source import Source

WEIGHT, INDICES = ".shira_weight", ".shira_indices"
MASK = "given"  # not peft's `random`, which would draw a mask only for it to be replaced


def read(path: Path, base: Source) -> list[Move]:
    """Return what an adapter adds, under the base's names; its zeros come along."""
    if not (path / NAME).is_file() or not (path / SAFE).is_file():
        raise SourceError(f"{path}: an adapter of peft has {NAME} and {SAFE}, this has not")
    words = read_json((path / NAME).read_bytes(), str(path / NAME))
    if words.get("peft_type") != "SHIRA":
        raise SourceError(f"{path}: is an adapter of kind {words.get('peft_type')}, not SHIRA")
    own = _own_names(base)
    moves = []
    with open_raw(path / SAFE, str(path)) as file:
        foreign = [name for name in file if not name.startswith(PREFIX)]
        if foreign:
            raise SourceError(f"{path}: {listed(foreign)} does not begin with {PREFIX}")
        rest = {name.removeprefix(PREFIX): file.tensor(name) for name in file}
    for name in [name for name in rest if name.endswith(WEIGHT)]:
        module = name.removesuffix(WEIGHT)
        values, indices = rest.pop(name), rest.pop(f"{module}{INDICES}", None)
        moves.append(_move(module, values, indices, own, base, path))
    for name, tensor in rest.items():
        if name.endswith(INDICES):
            raise SourceError(f"{path}: {name} has no {WEIGHT[1:]}: the file is damaged")
        plain = WRAPPED.sub("", name)
        moves.append(Move(own.get(plain, plain), "dense", tuple(tensor.shape), tensor))
    return moves


def _own_names(base: Source) -> dict[str, str]:
    """Return the base's name for each of the model's."""
    built = skeleton(base)
    return {built.rename(name): name for name in base}


def _move(
    module: str,
    values: Tensor,
    indices: Tensor | None,
    own: Mapping[str, str],
    base: Source,
    path: Path,
) -> Move:
    name = own.get(f"{module}.weight")
    if name is None:
        raise SourceError(f"{path}: changes {module}, which {base.reference} has not")
    if indices is None or tuple(indices.shape) != (2, values.numel()):
        raise SourceError(f"{path}: {module} has no place for each of its {values.numel()} values")
    rows, columns = indices.to(torch.int64)  # peft writes them as floats on Windows
    shape = base[name].shape
    if len(shape) != 2 or not _inside(rows, shape[0]) or not _inside(columns, shape[1]):
        raise SourceError(f"{path}: {module}: a place lies outside its {list(shape)}")
    flat, order = torch.sort(rows * shape[1] + columns)
    return Move(name, "add", tuple(shape), values[order], flat)


def _inside(places: Tensor, length: int) -> bool:
    return not len(places) or (int(places.min()) >= 0 and int(places.max()) < length)


def write(moves: Iterable[Move], folder: Path, base: Source) -> tuple[list[Move], int]:
    """Write an adapter; return the moves as they are there, and how many entries round."""
    built = skeleton(base)
    held = list(moves)
    _require_linear(held, built)
    rank = _rank(held)
    tensors, written, inexact = {}, [], 0
    for move in held:
        values, beside = added(move)
        inexact += beside
        if values.dtype == torch.float64:
            raise SourceError(f"{move.name}: is float64, and SHiRA's values are float32")
        flat, values = _padded(move, values.to(torch.float32), rank)
        columns = move.shape[1]
        module = PREFIX + built.rename(move.name).removesuffix(".weight")
        tensors[module + WEIGHT] = values
        tensors[module + INDICES] = torch.stack((flat // columns, flat % columns)).to(torch.int32)
        written.append(Move(move.name, "add", move.shape, values, flat))
    save_file(tensors, folder / SAFE, metadata={"format": "pt"})
    words = _words(base, rank, [built.rename(move.name) for move in held])
    text = json.dumps(words, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
    return written, inexact


def _require_linear(moves: Iterable[Move], built: Skeleton) -> None:
    """Name all that SHiRA cannot hold, in one error."""
    other = [m.name for m in moves if built.kind(m.name, m.shape) != "linear"]
    whole = [m.name for m in moves if m.kind == "dense" and m.name not in other]
    if other or whole:
        told = [f"{listed(other)}: is no linear layer's weight"] if other else []
        told += [f"{listed(whole)}: stored whole, which has no place"] if whole else []
        raise SourceError(
            f"{'; '.join(told)}: SHiRA holds entries of linear layers alone; leave the others out "
            "(`delta extract --exclude '*norm*'` and the like), or convert to another format"
        )


def _rank(moves: Iterable[Move]) -> int:
    """Return the smallest r of which r * (in + out) entries hold the entries of every layer."""
    rank, largest = 1, None
    for move in moves:
        rank = max(rank, -(-len(move.values) // sum(move.shape)))
    for move in moves:
        if rank * sum(move.shape) > move.shape[0] * move.shape[1]:
            largest = max(moves, key=lambda m: len(m.values) / sum(m.shape))
            raise SourceError(
                f"{largest.name}: its {len(largest.values)} entries need r = {rank}, and peft "
                f"takes one r for all: {move.name} of {list(move.shape)} is smaller than r * (in + "
                "out); extract a lower density, or with --scope tensor"
            )
    return rank


def _padded(move: Move, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return flat places and values with zeros at the first places that nothing changes."""
    assert move.indices is not None
    rows, columns = move.shape
    free = torch.ones(rows * columns, dtype=torch.bool)
    free[move.indices] = False
    lacking = rank * (rows + columns) - len(values)
    flat, order = torch.sort(torch.cat((move.indices, free.nonzero().flatten()[:lacking])))
    return flat, torch.cat((values, torch.zeros(lacking)))[order]


def _words(base: Source, rank: int, names: Iterable[str]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base.reference,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": MASK,
        "modules_to_save": None,
        "peft_type": "SHIRA",
        "r": rank,
        "random_seed": None,
        "revision": base.revision,
        "target_modules": sorted(name.removesuffix(".weight") for name in names),
        "task_type": None,
    }
