"""FP8 weights times their scales, computed while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.dtypes import TORCH
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.tiles import ComputedReader, Recent, columns, stored_rows, tile_size

if TYPE_CHECKING:
    from mergekit_ft.sources.quantised import Scaled
    from mergekit_ft.sources.source import Source


def reader(source: Source, scaled: Mapping[str, Scaled]) -> ComputedReader:
    """Return a reader of these weights as float32."""
    recent = Recent()
    recipes = {
        name: Dequantised(source.reference, source.reader, found, recent)
        for name, found in scaled.items()
    }
    return ComputedReader(source.reader, recipes)


class Dequantised:
    """One weight: each element times the scale of its block."""

    def __init__(self, reference: str, behind: Reader, scaled: Scaled, recent: Recent) -> None:
        self._reference, self.reader, self._recent = reference, behind, recent
        self.stored, self._scale = scaled.weight, scaled.scale
        shape = self.stored.shape
        self._height = shape[-2] if len(shape) > 1 else 1  # rows of a matrix
        self._block = (scaled.block[0], scaled.block[1])
        self.overhead = 3 * 4 * tile_size(self.stored) + 8 * self._scale.numel

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) float32."""
        tile = stored_rows(self.reader, self.stored, first, stop).float()
        tall, wide = self._block
        row = torch.arange(first, stop)
        down = -(-self._height // tall)  # blocks in a column of a matrix
        which = row // self._height * down + row % self._height // tall
        scales = self._recent.of(self.stored.name, self._scales)[which]  # (rows, blocks)
        whole = columns(self.stored) // wide
        blocks = tile[:, : whole * wide].view(-1, whole, wide)
        blocks.mul_(scales[:, :whole, None])
        if whole * wide < tile.shape[1]:
            tile[:, whole * wide :].mul_(scales[:, whole:])
        return tile

    def _scales(self) -> Tensor:
        """Return (rows of blocks, blocks in a row) float32, each a finite number above zero."""
        data = bytearray(self._scale.nbytes)
        self.reader.read_into(self._scale, 0, memoryview(data))
        scales = torch.frombuffer(data, dtype=TORCH[self._scale.dtype]).float()
        wrong = ~(scales.isfinite() & (scales > 0))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise SourceError(
                f"{self._reference}: {self._scale.name} holds {float(scales[at])} at element {at}, "
                "which is no scale: fetch or save the checkpoint again"
            )
        return scales.view(-1, -(-columns(self.stored) // self._block[1]))

    def close(self) -> None:
        """Forget the scales that were kept."""
        self._recent.clear()
