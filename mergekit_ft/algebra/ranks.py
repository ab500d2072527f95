"""The order of the magnitudes within each row."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4  # of scratch


def ascending(values: Tensor, length: int, scratch: Tensor) -> Tensor:
    """Return (rows, length) the places of each row's magnitudes, from the smallest, stable.

    Scratch is (4, n); the answer lies in its second and third row, which must start at an even one
    of all rows, and the others are free again.
    """
    magnitudes = torch.abs(values, out=scratch[0]).view(-1, length)
    order = longs(scratch[1:3]).view(-1, length)
    if values.device.type != "cpu" or values.dtype != torch.float32:
        by_value = scratch[3].view(-1, length)
        torch.sort(magnitudes, dim=1, stable=True, out=(by_value, order))
        return order
    # A magnitude's bits order as it does; with its place below them equals are told apart, and
    # numpy sorts integers several times faster than torch.
    order.copy_(magnitudes.view(torch.int32)).bitwise_left_shift_(32)
    order.bitwise_or_(torch.arange(length))
    order.numpy().sort(axis=1)
    return order.bitwise_and_(2**32 - 1)


def longs(rows: Tensor) -> Tensor:
    """Return (n,) 64-bit integers in the memory of two rows of scratch."""
    whole = rows.as_strided((2 * rows.stride(0),), (1,))
    return whole.view(torch.int64)[: rows.shape[1]]
