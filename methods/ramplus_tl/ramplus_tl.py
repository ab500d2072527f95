"""RAM+, Reinforced Agent Merging (Yuan et al. 2026, arXiv:2601.13572), counted tensor by tensor.

For task vectors  d_t = theta_t - theta_0  of k tuned models:

    probe      m_t    = 1 where |d_t| > epsilon, else 0
               c      = sum_t m_t, the models that changed the element
    count      u_t    = elements of the tensor that only t changed
               o_t    = elements that t and another changed
    rescale    f_t    = 1 + r clip(o_t / max(u_t, epsilon), 0, alpha)
    merge      d      = f_t d_t of the only model where c = 1, the mean of the c that changed it
                      where c > 1, 0 where c = 0
    return     theta_0 + d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra import overlap
from mergekit_ft.contract import About, Block, Measure, Operator, Place, Survey, shared


class RamplusTl(Operator):
    """Average what several models changed, strengthen what only one did."""

    r: float = shared(0.1, description="how much overlap strengthens what only one changed")
    alpha: float = shared(0.2, ge=0, description="most that the overlap counts for")
    epsilon: float = shared(1e-5, ge=0, description="changes up to this size count as none")

    def scratch(self, k: int) -> int:
        """Return the rows for a count, a mask and a sum, or for the sizes of k deltas."""
        return max(3, k)

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the only model, where each of its changes counts."""
        return 0 if k == 1 and self.epsilon == 0.0 else None

    def survey(self, about: About) -> Survey:
        """Find each model's factor for what it alone changed."""
        (counted,) = yield (Measure(_sizes, host=self._counts),)
        return [self._factor(changed, alone) for changed, alone in counted.tolist()]

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        count, spare, scaled = block.scratch[:3]
        deltas = overlap.changes(block, self.epsilon, count, spare)
        torch.mul(deltas[0], finding[0], out=scaled)
        mix = deltas[0]
        for delta, factor in zip(deltas[1:], finding[1:], strict=True):
            scaled.add_(delta, alpha=factor)
            mix.add_(delta)
        alone = torch.eq(count, 1, out=spare)
        mix.div_(count.clamp_(min=1))
        return torch.lerp(mix, scaled, alone, out=mix)  # by 0 or 1, so exactly one of the two

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64."""
        deltas = overlap.reference_changes(base, tuned, self.epsilon)
        changed = deltas != 0
        count = changed.sum(0)
        factors = [self._factor(int(m.sum()), int((m & (count == 1)).sum())) for m in changed]
        scaled = sum((f * delta for f, delta in zip(factors, deltas, strict=True)), 0 * base)
        return torch.where(count == 1, scaled, deltas.sum(0) / count.clamp(min=1))

    def _factor(self, changed: int, alone: int) -> float:
        shared_to_own = (changed - alone) / (max(alone, self.epsilon) or 1.0)
        return 1.0 + self.r * min(self.alpha, shared_to_own)

    def _counts(self, block: Block, sizes: Tensor) -> Tensor:
        """Return (k, 2): how many elements each model changed, and how many it alone did.

        In host memory: numpy compares and counts bytes faster than torch does.
        """
        masks = [row > self.epsilon for row in sizes.numpy()]
        alone = sum(mask.view(np.uint8) for mask in masks) == 1
        counts = [[np.count_nonzero(mask), np.count_nonzero(mask & alone)] for mask in masks]
        return torch.tensor(counts)


def _sizes(block: Block) -> Tensor:
    """Return (k, n) the magnitudes of the deltas, in scratch."""
    sizes = block.scratch[: len(block.tuned)]
    return torch.sub(block.tuned, block.base, out=sizes).abs_()
