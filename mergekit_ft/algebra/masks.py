"""Masks kept between a survey and the merge: one bit an entry, where there is room for them."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.randomness import Bits
from mergekit_ft.contract import About, Block


class Masks:
    """The masks of a tensor's blocks, in one piece of memory."""

    def __init__(self, k: int, about: About) -> None:
        self.room = k * about.numel <= 8 * about.spare
        self._shape = k, about.numel // 8 + about.numel // about.cell + 2
        self._bits: Bits | None = None
        self._kept: set[tuple[int, int, int]] = set()  # model, start and length of a block
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, block: Block, i: int, mask: Bits) -> None:
        """Keep the (n,) ones and zeros of model i."""
        if self.room:
            with self._lock:
                if self._bits is None:
                    self._bits = np.empty(self._shape, dtype=np.uint8)
                self._kept.add((i, block.start, block.n))
            self._place(self._bits, block, i)[:] = np.packbits(mask)

    def kept(self, block: Block, i: int) -> Bits | None:
        """Return the (n,) ones and zeros of model i, if they were kept."""
        if self._bits is None or (i, block.start, block.n) not in self._kept:
            return None
        return np.unpackbits(self._place(self._bits, block, i), count=block.n)

    def _place(self, bits: Bits, block: Block, i: int) -> Bits:
        """Return where a block's bits lie: a cell may begin within a byte, so it has one more."""
        start = block.start // 8 + block.start // block.cell
        return bits[i, start : start + (block.n + 7) // 8]


def apply(mask: Bits, delta: Tensor) -> Tensor:
    """Set to zero, in place, what the (n,) ones and zeros do not keep."""
    return delta.mul_(torch.as_tensor(mask, device=delta.device))
