"""Base weights with an adapter's change, computed while they are read."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.dtypes import SIZE, TORCH
from mergekit_ft.sources.files import Reader
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.tiles import Recent, columns, stored_rows, tile_rows, tile_size


@dataclass(frozen=True)
class Stored:
    """A tensor and what reads it."""

    reader: Reader
    info: TensorInfo

    def whole(self) -> Tensor:
        """Return all of it as it is stored."""
        data = bytearray(self.info.nbytes)
        self.reader.read_into(self.info, 0, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[self.info.dtype]).view(self.info.shape)


class Saved:
    """A tensor that stands in an adapter whole, instead of the base's."""

    def __init__(self, tensor: Stored) -> None:
        self.reader, self.stored = tensor.reader, tensor.info
        self.overhead = SIZE[self.stored.dtype] * tile_size(self.stored)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) as stored."""
        return stored_rows(self.reader, self.stored, first, stop)

    def close(self) -> None:
        """Do nothing: nothing was kept."""


class Shifted:
    """A bias to which a scaled bias of an adapter is added."""

    def __init__(self, base: Stored, bias: Stored, scale: float, dtype: str) -> None:
        self.reader, self.stored = base.reader, base.info
        self._bias, self._scale, self._dtype = bias, scale, TORCH[dtype]
        self.overhead = 4 * 8 * self.stored.numel

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (1, n), the only row."""
        base = stored_rows(self.reader, self.stored, first, stop).to(self._dtype)
        return add(base, self._bias.whole().view(1, -1).to(self._dtype).mul_(self._scale))

    def close(self) -> None:
        """Do nothing: nothing was kept."""


@dataclass(frozen=True)
class Product:
    """scale * B @ A of one module, and how it lies along the stored weight."""

    where: str  # adapter and module, for errors
    a: Stored  # (rank, in)
    b: Stored  # (out, rank)
    scale: float
    transposed: bool  # the weight is stored (in, out), as a Conv1D and an embedding are
    magnitude: Stored | None = None  # (out,) of DoRA


class LowRank:
    """A weight to which a product of low rank is added, rescaled where it is DoRA's."""

    def __init__(self, base: Stored, product: Product, dtype: str, recent: Recent) -> None:
        self.reader, self.stored = base.reader, base.info
        self._product, self._dtype, self._recent = product, TORCH[dtype], recent
        self._left, self._right = product.b, product.a
        if product.transposed:
            self._left, self._right = product.a, product.b
        self._norms: Tensor | None = None  # (columns,) float64, where DoRA takes those of columns
        self._once = threading.Lock()
        size = SIZE[dtype]
        factors = self._left.info.nbytes + self._right.info.nbytes + size * self._right.info.numel
        self.overhead = factors + 4 * size * tile_size(self.stored)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return (rows, columns) of base + scale * B @ A."""
        summed = self._summed(first, stop)
        return summed if self._product.magnitude is None else self._rescaled(summed, first, stop)

    def _summed(self, first: int, stop: int) -> Tensor:
        left, right, _ = self._recent.of(self.stored.name, self._factors)
        part = left[:, first:stop].T if self._product.transposed else left[first:stop]
        base = stored_rows(self.reader, self.stored, first, stop).to(self._dtype)
        return add(base, (part.to(self._dtype) @ right).mul_(self._product.scale))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the factor along rows as stored, (rank, columns) of the other, and DoRA's."""
        right = self._right.whole()
        right = right.T if self._product.transposed else right
        magnitude = self._product.magnitude
        along = magnitude.whole().flatten().to(self._dtype) if magnitude is not None else None
        return self._left.whole(), right.to(self._dtype).contiguous(), along

    def _rescaled(self, summed: Tensor, first: int, stop: int) -> Tensor:
        """Return magnitude * W / |W|, the norm of each output's weights as peft takes it."""
        if self._product.transposed:
            norms = self._column_norms().view(1, -1)
        else:
            norms = torch.linalg.vector_norm(summed, dim=1, keepdim=True, dtype=torch.float64)
            self._require_length(norms, first)
        magnitude = self._recent.of(self.stored.name, self._factors)[2]
        assert magnitude is not None
        part = magnitude.view(1, -1) if self._product.transposed else magnitude[first:stop, None]
        return summed.mul_(part / norms.to(self._dtype))

    def _column_norms(self) -> Tensor:
        """Return (columns,) the norms over all rows: tile by tile, in order, once."""
        with self._once:
            if self._norms is None:
                total = torch.zeros(columns(self.stored), dtype=torch.float64)
                rows = self.stored.numel // columns(self.stored)
                for first in range(0, rows, tile_rows(self.stored)):
                    stop = min(first + tile_rows(self.stored), rows)
                    total += self._summed(first, stop).double().square_().sum(0)
                self._norms = total.sqrt_()
                self._require_length(self._norms, 0)
            return self._norms

    def _require_length(self, norms: Tensor, first: int) -> None:
        zero = norms.flatten() == 0
        if bool(zero.any()):
            raise SourceError(
                f"{self._product.where}: DoRA divides by the norm of output "
                f"{first + int(zero.nonzero()[0])} of {self.stored.name}, which is zero"
            )

    def close(self) -> None:
        """Forget the factors that were kept."""
        self._recent.clear()


def add(base: Tensor, change: Tensor) -> Tensor:
    """Return base + change, where nothing changes with the base's own bits, -0 included."""
    return base.sub_(change.neg_().add_(0.0))
