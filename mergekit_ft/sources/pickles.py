"""Pickled checkpoints, read as tensors and nothing else, as if they were safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.dtypes import CODE
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import SourceFile, TensorInfo
from mergekit_ft.sources.layout import SHARD, Layout, check_index
from mergekit_ft.sources.ties import ties

CONVERT = "convert it (from_pretrained, save_pretrained writes safetensors)"


class PickleReader:
    """Copies bytes out of tensors that torch has mapped from their files."""

    overhead = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._last: tuple[str, torch.Tensor] | None = None  # one that had to be made contiguous

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        if len(into):
            data = self._flat(info.name)[start : start + len(into)]
            torch.frombuffer(into, dtype=torch.uint8).copy_(data)

    def _flat(self, name: str) -> torch.Tensor:
        tensor, last = self._tensors[name], self._last
        if tensor.is_contiguous():
            return tensor.view(-1).view(torch.uint8)
        if last is None or last[0] != name:
            last = self._last = (name, tensor.contiguous().view(-1).view(torch.uint8))
        return last[1]

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Do nothing: the system maps pages as they are touched."""

    def close(self) -> None:
        """Forget the copy that was kept; the mapped tensors stay readable."""
        self._last = None


def open_pickles(
    folder: Path, layout: Layout, config: Mapping[str, Any]
) -> tuple[tuple[SourceFile, ...], Reader, Layout]:
    """Load the tensors of each file, mapped; return their layout under safetensors' names."""
    loaded = {name: _load(folder / name) for name in layout.files}
    check_index(layout, loaded, str(folder))
    names = _renamed(layout.files)
    files = [_file(folder / name, names[name], tensors) for name, tensors in loaded.items()]
    tensors = {key: tensor for found in loaded.values() for key, tensor in found.items()}
    drop = _aliases(config, files, tensors)
    kept = tuple(_without(file, drop) for file in files)
    return kept, PickleReader(tensors), _mapped(layout, names, drop)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises what it meets: pickle, zip, runtime errors
        raise SourceError(f"{path}: {_why(error)}: {CONVERT}") from error
    inner = loaded.get("state_dict") if isinstance(loaded, dict) else None
    state = inner if isinstance(inner, dict) else loaded
    if not isinstance(state, dict):
        raise SourceError(f"{path}: holds no map from names to tensors: {CONVERT}")
    return {name: _tensor(path, name, value) for name, value in state.items()}


def _why(error: Exception) -> str:
    text = str(error)
    if "mmap can only be used" in text:
        return "a pickle of the format before torch 1.6, which cannot be read piece by piece"
    if "Weights only load failed" in text or "UnpicklingError" in type(error).__name__:
        return "holds more than tensors, and none of it was run"
    return f"torch cannot read it ({text.splitlines()[0] if text else type(error).__name__})"


def _tensor(path: Path, name: object, value: object) -> torch.Tensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise SourceError(f"{path}: {name!r} is not a tensor but {type(value).__name__}: {CONVERT}")
    if value.layout is not torch.strided or value.dtype not in CODE:
        raise SourceError(
            f"{path}: tensor {name!r} is {value.layout}, {value.dtype}, which is not supported"
        )
    return value.detach()


def _renamed(names: Iterable[str]) -> dict[str, str]:
    """Return what each file would be called in a safetensors checkpoint."""
    found = {}
    names = list(names)
    for name in names:
        match = SHARD.fullmatch(name)
        stem = re.sub(r"\.\w+$", "", name)
        if match:
            stem = f"model-{match['number']}-of-{match['total']}"
        elif len(names) == 1:
            stem = "model"
        found[name] = f"{stem}.safetensors"
    return found


def _file(path: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> SourceFile:
    infos, offset = [], 0
    for key, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        shape = tuple(tensor.shape)
        infos.append(TensorInfo(key, CODE[tensor.dtype], shape, name, offset, nbytes))
        offset += nbytes
    stat = path.stat()
    return SourceFile(name, path, stat.st_size, {"format": "pt"}, tuple(infos), stat.st_mtime_ns)


def _aliases(
    config: Mapping[str, Any], files: Iterable[SourceFile], tensors: Mapping[str, torch.Tensor]
) -> set[str]:
    """Return the tied names that are one memory with what they are tied to."""
    infos = {info.name: info for file in files for info in file.tensors}
    return {
        name
        for name, to in ties(config, infos).items()
        if name in tensors and _same(tensors[name], tensors[to])
    }


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _without(file: SourceFile, drop: set[str]) -> SourceFile:
    kept = [info for info in file.tensors if info.name not in drop]
    offset, moved = 0, []
    for info in kept:
        moved.append(replace(info, offset=offset))
        offset += info.nbytes
    return replace(file, tensors=tuple(moved))


def _mapped(layout: Layout, names: Mapping[str, str], drop: set[str]) -> Layout:
    """Return the layout with its index saying where the tensors would be."""
    index = layout.index
    if index:
        weight_map = {
            key: names[file] for key, file in layout.weight_map.items() if key not in drop
        }
        index = {**index, "weight_map": weight_map}
    return Layout(tuple(names[name] for name in layout.files), index, True)
