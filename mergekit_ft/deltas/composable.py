"""composable-sft's `pytorch_diff.bin` (Ansell et al. 2022): differences of entries, whole tensors.

`diffs` maps a name to its size, to the steps between flat indices in which the FIRST axis runs
fastest, and to what is added; `abs` maps a name to a whole tensor. The released decoder is wrong
from three axes on, and overflows past 2**31 elements; the arithmetic here is

    index_j = sum of the first j + 1 steps        coordinate_d = (index // prod(size[:d])) % size[d]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.deltas.moves import Move, added
from mergekit_ft.deltas.unpickling import load
from mergekit_ft.errors import SourceError

FILE = "pytorch_diff.bin"
KEYS = {"diffs", "abs"}
ENCODED = {"size", "index_steps", "values"}


def read(path: Path) -> list[Move]:
    """Return what a folder of composable-sft, or its file, does; row-major indices."""
    file = path / FILE if path.is_dir() else path
    held = load(file)
    if not isinstance(held, dict) or not held.keys() <= KEYS or "diffs" not in held:
        raise SourceError(
            f"{file}: holds no `diffs` and `abs`, as composable-sft writes them"
            + (": it is of an early version (`body`, `head`)" if _early(held) else "")
        )
    diffs, whole = held["diffs"], held.get("abs") or {}
    if not isinstance(diffs, dict) or not isinstance(whole, dict):
        raise SourceError(f"{file}: its `diffs` and `abs` are no maps from names")
    both = sorted(diffs.keys() & whole.keys())
    if both:
        raise SourceError(f"{file}: {both[0]} has a difference and is whole as well")
    moves = [_decoded(name, encoded, file) for name, encoded in diffs.items()]
    return [*moves, *(_whole(name, tensor, file) for name, tensor in whole.items())]


def _early(held: Any) -> bool:
    return isinstance(held, dict) and "body" in held


def _whole(name: str, tensor: Any, file: Path) -> Move:
    if not isinstance(tensor, Tensor):
        raise SourceError(f"{file}: {name} is no tensor")
    return Move(name, "dense", tuple(tensor.shape), tensor.detach())


def _decoded(name: str, encoded: Any, file: Path) -> Move:
    if not isinstance(encoded, dict) or encoded.keys() != ENCODED:
        raise SourceError(f"{file}: {name} lacks one of {', '.join(sorted(ENCODED))}")
    size, values, steps = tuple(encoded["size"]), encoded["values"], encoded["index_steps"]
    if not isinstance(steps, list) or not all(isinstance(n, (int, np.integer)) for n in steps):
        raise SourceError(f"{file}: {name}: its steps are no whole numbers")
    if not all(type(n) is int and n >= 0 for n in size):
        raise SourceError(f"{file}: {name}: its size is no row of whole numbers")
    if not isinstance(values, Tensor) or values.shape != (len(steps),):
        raise SourceError(f"{file}: {name} has {len(steps)} indices, and not as many values")
    if any(abs(int(step)) > prod(size) for step in steps):  # their sum stays below 2**63
        raise SourceError(f"{file}: {name}: a place is outside its size {list(size)}")
    flat = torch.from_numpy(np.cumsum(np.array(steps, dtype=np.int64)))
    if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= prod(size)):
        raise SourceError(f"{file}: {name}: a place is outside its size {list(size)}")
    indices, order = torch.sort(row_major(flat, size))
    return Move(name, "add", size, values.detach()[order], indices)


def row_major(column_major: Tensor, size: Sequence[int]) -> Tensor:
    """Return (n,) int64 flat indices, last axis fastest, of those with the first axis fastest."""
    found = torch.zeros_like(column_major)
    for length, stride in zip(size, accumulate((1, *size[:-1]), mul), strict=False):
        found = found * length + (column_major // stride) % length
    return found


def column_major(row: Tensor, size: Sequence[int]) -> Tensor:
    """Return (n,) int64 flat indices, first axis fastest, of those with the last axis fastest."""
    found, rest = torch.zeros_like(row), row
    for d in range(len(size) - 1, -1, -1):
        found += (rest % size[d]) * prod(size[:d])
        rest = rest // size[d]
    return found


def _encoded(move: Move, values: Tensor) -> dict[str, Any]:
    assert move.indices is not None
    indices, order = torch.sort(column_major(move.indices, move.shape))
    flat = indices.numpy()
    steps: list[Any] = np.diff(flat, prepend=0).tolist()
    if steps:
        steps[0] = np.int64(steps[0])  # as the authors' encoder leaves it
    return {"size": torch.Size(move.shape), "index_steps": steps, "values": values[order].clone()}


def write(moves: Iterable[Move], folder: Path) -> tuple[list[Move], int]:
    """Write moves into a folder; return them as they are there, and how many entries round."""
    diffs, whole, written, inexact = {}, {}, [], 0
    for move in moves:
        if move.kind == "dense":
            _require_shape(move)
            whole[move.name] = move.values.clone()
            written.append(Move(move.name, "dense", move.shape, move.values))
            continue
        values, beside = added(move)
        inexact += beside
        diffs[move.name] = _encoded(move, values)
        written.append(Move(move.name, "add", move.shape, values, move.indices))
    torch.save({"diffs": diffs, "abs": whole}, folder / FILE)
    return written, inexact


def _require_shape(move: Move) -> None:
    if move.originals is not None and move.originals.shape != move.values.shape:
        raise SourceError(
            f"{move.name}: becomes {list(move.shape)} where the base has "
            f"{list(move.originals.shape)}, and composable-sft copies into what is there: take the "
            "base with the larger vocabulary, and extract against that"
        )
