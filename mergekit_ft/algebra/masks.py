"""Masks kept between a survey and the merge: one bit an entry, where there is room for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra.randomness import Bits
from mergekit_ft.contract import About, Block


class Masks:
    """The masks of a tensor's blocks."""

    def __init__(self, k: int, about: About) -> None:
        self.room = k * about.numel <= 8 * about.spare
        self._kept: dict[tuple[int, int, int], Bits] = {}  # by model, start and length of a block

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, block: Block, i: int, mask: Bits) -> None:
        """Keep the (n,) ones and zeros of model i."""
        if self.room:
            self._kept[i, block.start, block.n] = np.packbits(mask)

    def kept(self, block: Block, i: int) -> Bits | None:
        """Return the (n,) ones and zeros of model i, if they were kept."""
        bits = self._kept.get((i, block.start, block.n))
        return None if bits is None else np.unpackbits(bits, count=block.n)


def apply(mask: Bits, delta: Tensor) -> Tensor:
    """Set to zero, in place, what the (n,) ones and zeros do not keep."""
    return delta.mul_(torch.as_tensor(mask, device=delta.device))
