"""Files of composable-sft (LT-SFT, Ansell et al. 2022): a folder with `pytorch_diff.bin`.

{"diffs": {name: {"size", "index_steps", "values"}}, "abs": {name: tensor}}. Indices are flat and
column-major (the first axis runs fastest), each as its step from the one before. The released
decoder takes them apart rightly for one and two axes, wrongly for more; here any number is right.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.deltas.foreign import Foreign, Sparse, refuse_kinds, sums, whole
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.delta_file import DeltaFile

FILE = "pytorch_diff.bin"
KINDS = {"add": "diffs", "replace": "diffs", "dense": "abs"}
SAFE: list[Any] = [np.int64(0).__reduce__()[0], np.dtype, np.dtypes.Int64DType]  # of numpy


def read(path: Path) -> Foreign:
    """Return what a file holds; only tensors, numbers and texts are taken out of the pickle."""
    file = path / FILE if path.is_dir() else path
    try:
        with torch.serialization.safe_globals(SAFE):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{file}: cannot be read as composable-sft's: {told}") from None
    if not isinstance(held, dict) or not {"diffs", "abs"} <= held.keys():
        raise SourceError(f"{file}: has no `diffs` and `abs`: is it composable-sft's?")
    found = Foreign(str(path))
    for name, part in held["diffs"].items():
        found.added[name] = _decoded(str(file), name, part)
    found.whole = {name: tensor.contiguous() for name, tensor in held["abs"].items()}
    return found


def _decoded(file: str, name: str, part: Any) -> Sparse:
    if not isinstance(part, dict) or not {"size", "index_steps", "values"} <= part.keys():
        raise SourceError(f"{file}: {name} lacks size, index_steps or values")
    size, values = tuple(part["size"]), part["values"]
    flat = np.cumsum(np.asarray(part["index_steps"], dtype=np.int64))
    if len(flat) != len(values):
        raise SourceError(f"{file}: {name} has {len(flat)} places and {len(values)} values")
    numel = int(np.prod(size, dtype=np.int64))
    if len(flat) and (flat.min() < 0 or flat.max() >= numel):
        raise SourceError(f"{file}: {name}: a place is outside its size {list(size)}")
    rows = np.ravel_multi_index(np.unravel_index(flat, size, order="F"), size)
    order = np.argsort(rows, kind="stable")
    return Sparse(torch.from_numpy(rows[order].astype(np.int64)), values[torch.from_numpy(order)])


def write(delta: DeltaFile, out: Path) -> int:
    """Write a delta as composable-sft's folder; return the entries of its diffs."""
    refuse_kinds(delta, KINDS, "composable-sft")
    diffs: dict[str, dict[str, Any]] = {}
    for change, part in sums(delta):
        columns = np.ravel_multi_index(
            np.unravel_index(part.indices.numpy(), change.shape), change.shape, order="F"
        )
        order = np.argsort(columns, kind="stable")
        steps = np.diff(columns[order], prepend=0)
        coded = [np.int64(steps[0]), *map(int, steps[1:])] if len(steps) else []
        diffs[change.name] = {
            "size": torch.Size(change.shape),
            "index_steps": coded,
            "values": part.values[torch.from_numpy(order)],
        }
    absolute: dict[str, Tensor] = dict(whole(delta))
    out.mkdir(parents=True)
    torch.save({"diffs": diffs, "abs": absolute}, out / FILE)
    return sum(len(part["index_steps"]) for part in diffs.values())
