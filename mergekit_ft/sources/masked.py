"""A task's part of a pack: the unified vector where the task's mask is set, scaled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.sources.delta_file import Change, DeltaFile
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.low_rank import Stored, add
from mergekit_ft.sources.tiles import columns, stored_rows, tile_size


class Mask:
    """What a pack holds of one tensor for one task, read a run at a time."""

    def __init__(self, pack: DeltaFile, change: Change, task: str) -> None:
        self._pack, self._change = pack, change
        self._number = pack.tasks.index(task)
        self.scale = float(pack.words["scales"][self._number])

    def unified(self, start: int, count: int) -> Tensor:
        """Return (count,) of the vector, as stored, from an entry on."""
        info = self._change.parts["unified"]
        width = SIZE[info.dtype]
        data = bytearray(count * width)
        self._pack.reader.read_into(info, start * width, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[info.dtype])

    def bits(self, start: int, count: int) -> Tensor:
        """Return (count,) ones and zeros, from an entry on."""
        info = self._change.parts["masks"]
        first, last = start // 8, -(-(start + count) // 8)
        data = bytearray(last - first)
        at = self._number * info.shape[1] + first
        self._pack.reader.read_into(info, at, memoryview(data))
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return torch.from_numpy(bits[start - 8 * first :][:count])


class Masked:
    """A tensor to which scale * unified is added where a task's bits are set."""

    def __init__(self, base: Stored, mask: Mask, scale: float, dtype: torch.dtype) -> None:
        self.reader, self.stored = base.reader, base.info
        self._mask, self._scale, self._dtype = mask, scale * mask.scale, dtype
        self.overhead = 5 * dtype.itemsize * tile_size(base.info) + base.reader.overhead

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) in the dtype of the arithmetic."""
        rows = stored_rows(self.reader, self.stored, first, stop).to(self._dtype)
        start = first * columns(self.stored)
        change = self._mask.unified(start, rows.numel()).to(self._dtype).mul_(self._scale)
        change.mul_(self._mask.bits(start, rows.numel()))
        return add(rows, change.view_as(rows))

    def close(self) -> None:
        """Do nothing: nothing was kept."""
