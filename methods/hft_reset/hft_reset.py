"""The half reset of a tuned model (Hui et al. 2024, arXiv:2404.18466, by the draw of HFT).

In every block of the tuned model, by one draw:

    attention      2 of {q, k, v, o} go back to the base
    feed-forward   1 of {up, gate, down} in a random half of the blocks, 2 in the others
    norms          1 of 2
    beside         embeddings and the head stay as tuned

What HFT with the same seed trains is what stays, so to reset its outcome changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import PrivateAttr
from torch import Tensor

from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.algebra.halves import half
from mergekit_ft.contract import About, Block, Operator, Place, setting


class HftReset(Operator):
    """Half of each block put back to the base's values."""

    tuned: ClassVar[tuple[int, int | None]] = (1, 1)

    seed: int = setting(0, ge=0, description="which half")

    _reset: frozenset[str] = PrivateAttr(default=frozenset())

    def seated(self, model: Mapping[str, Place]) -> HftReset:
        """Return the operator with the parameters of this model that go back drawn."""
        stays = half(model, model, self.seed, 0)
        mine = self.model_copy()
        mine._reset = frozenset(name for name in model if name not in stays)
        return mine

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the base for what goes back, the tuned model for what stays."""
        return -1 if name in self._reset else 0

    def table(self, name: str, place: Place) -> dict[str, Any]:
        """Return the seed, and whether the tensor goes back."""
        return {"seed": self.seed, "reset": name in self._reset}

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) no delta, or all of it."""
        delta: Tensor = subtract_base(block.tuned, block.base)[0]
        if block.name in self._reset:
            delta.zero_()
        return delta

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the same in float64."""
        return 0.0 * base if about.name in self._reset else tuned[0] - base
