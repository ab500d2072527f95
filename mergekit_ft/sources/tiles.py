"""Tensors that are computed while they are read, a few whole rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import TensorInfo

TILE = 65_536  # elements: tiles begin at fixed rows, so that no cutting of reads moves a bit
Made = TypeVar("Made")


class Recipe(Protocol):
    """How the rows of one tensor are made."""

    reader: Reader  # of the stored tensor that is read along, element by element
    stored: TensorInfo
    overhead: int  # bytes that making a tile takes

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows [first, stop) in the dtype that is stated for the tensor."""

    def close(self) -> None:
        """Forget what was kept."""


class ComputedReader:
    """Makes the tensors that have a recipe; the others are read as they lie."""

    def __init__(self, behind: Reader, recipes: Mapping[str, Recipe]) -> None:
        self._behind = behind
        self._recipes = dict(recipes)
        self._last = Recent()  # the last tile: reads go on where others ended, or row by row
        tile = max((8 * tile_size(recipe.stored) for recipe in self._recipes.values()), default=0)
        own = max((recipe.overhead for recipe in self._recipes.values()), default=0)
        self.overhead = tile + own + behind.overhead

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        recipe = self._recipes.get(info.name)
        if recipe is None:
            self._behind.read_into(info, start, into)
        elif len(into):
            with one_thread():
                self._fill(recipe, info, start, torch.frombuffer(into, dtype=torch.uint8))

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Say that these bytes of a tensor will be read soon."""
        recipe = self._recipes.get(info.name)
        if recipe is None:
            self._behind.will_need(info, start, nbytes)
            return
        stored, width = recipe.stored, SIZE[info.dtype]
        first, count = (size // width * SIZE[stored.dtype] for size in (start, nbytes))
        recipe.reader.will_need(stored, first, count)

    def close(self) -> None:
        """Forget what was kept, and close what lies behind."""
        for recipe in self._recipes.values():
            recipe.close()
            recipe.reader.close()
        self._last.clear()
        self._behind.close()

    def _fill(self, recipe: Recipe, info: TensorInfo, start: int, out: Tensor) -> None:
        row = columns(info) * SIZE[info.dtype]  # bytes
        step = tile_rows(info)
        done, total = 0, out.numel()
        while done < total:
            first = (start + done) // row // step * step
            made = self._last.of((info.name, first), partial(_tile, recipe, info, first))
            part = made[start + done - first * row :][: total - done]
            out[done : done + part.numel()].copy_(part)
            done += part.numel()


def _tile(recipe: Recipe, info: TensorInfo, first: int) -> Tensor:
    """Return the bytes of the tile that begins at a row."""
    stop = min(first + tile_rows(info), info.numel // columns(info))
    return recipe.rows(first, stop).contiguous().flatten().view(torch.uint8)


def columns(info: TensorInfo) -> int:
    """Return the elements of a row: the last axis; a tensor of one axis is one row."""
    return max(1, info.shape[-1] if len(info.shape) > 1 else info.numel)


def tile_rows(info: TensorInfo) -> int:
    """Return how many rows are made at once."""
    return max(1, TILE // columns(info))


def tile_size(info: TensorInfo) -> int:
    """Return the elements of a tile."""
    return tile_rows(info) * columns(info)


def stored_rows(reader: Reader, info: TensorInfo, first: int, stop: int) -> Tensor:
    """Return rows [first, stop) of a tensor as they are stored, (stop - first, columns)."""
    dtype, wide = TORCH[info.dtype], columns(info)
    data = bytearray((stop - first) * wide * dtype.itemsize)
    reader.read_into(info, first * wide * dtype.itemsize, memoryview(data))
    return torch.frombuffer(data, dtype=dtype).view(stop - first, wide)


class Recent(threading.local):
    """What a thread made last, so that it is not made for every tile."""

    def __init__(self) -> None:
        self._made: tuple[Hashable, object] | None = None

    def of(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Return what was made under this name, else make it."""
        if self._made is None or self._made[0] != name:
            self._made = None  # let go before more is taken
            self._made = (name, make())
        return cast(Made, self._made[1])

    def clear(self) -> None:
        """Forget what this thread made."""
        self._made = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let this thread compute alone: how many do it may move a sum's last bit."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
