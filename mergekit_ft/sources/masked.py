"""A task's part of a pack: the unified vector where the task's mask is set, scaled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.sources.delta_file import Change, DeltaFile
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.low_rank import Stored, add
from mergekit_ft.sources.tiles import columns, stored_rows, tile_size


class Masked:
    """A tensor to which scale * unified is added where a task's bits are set."""

    def __init__(
        self,
        base: Stored,
        delta: DeltaFile,
        change: Change,
        number: int,
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        self.reader, self.stored = base.reader, base.info
        self._delta, self._change, self._number = delta, change, number
        self._scale, self._dtype = scale, dtype
        self.overhead = 5 * dtype.itemsize * tile_size(base.info) + base.reader.overhead

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) in the dtype of the arithmetic."""
        rows = stored_rows(self.reader, self.stored, first, stop).to(self._dtype)
        start = first * columns(self.stored)
        change = self._unified(start, rows.numel()).to(self._dtype).mul_(self._scale)
        change.mul_(self._bits(start, rows.numel()))
        return add(rows, change.view_as(rows))

    def _unified(self, start: int, count: int) -> Tensor:
        info = self._change.parts["unified"]
        width = SIZE[info.dtype]
        data = bytearray(count * width)
        self._delta.reader.read_into(info, start * width, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[info.dtype])

    def _bits(self, start: int, count: int) -> Tensor:
        """Return (count,) ones and zeros."""
        info = self._change.parts["masks"]
        first, last = start // 8, -(-(start + count) // 8)
        data = bytearray(last - first)
        at = self._number * info.shape[1] + first
        self._delta.reader.read_into(info, at, memoryview(data))
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return torch.from_numpy(bits[start - 8 * first :][:count])

    def close(self) -> None:
        """Do nothing: nothing was kept."""
