"""Masks kept between a survey and the merge: one bit an entry, where there is room for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.contract import About, Block

Bits = np.ndarray[Any, np.dtype[np.uint8]]


class Masks:
    """The masks of a tensor's blocks, those that were made in host memory."""

    def __init__(self, k: int, about: About) -> None:
        self.room = k * about.numel <= 8 * about.spare
        self._kept: dict[tuple[int, int, int], Bits] = {}  # by model, start and length of a block

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, block: Block, i: int, mask: Tensor) -> None:
        """Keep the (n,) ones and zeros of model i."""
        if self.room and mask.device.type == "cpu":
            self._kept[i, block.start, block.n] = np.packbits(mask.numpy() != 0)

    def kept(self, block: Block, i: int, into: Tensor) -> Tensor | None:
        """Return the (n,) ones and zeros of model i in the memory of a row, if they were kept."""
        bits = self._kept.get((i, block.start, block.n))
        if bits is None or into.device.type != "cpu":
            return None
        return into.copy_(torch.from_numpy(np.unpackbits(bits, count=block.n)))
