"""RAM, Reinforced Agent Merging (Yuan et al. 2026, arXiv:2601.13572).

For task vectors  d_t = theta_t - theta_0  of k tuned models, element by element:

    probe      m_t    = 1 where |d_t| > epsilon, else 0
               c      = sum_t m_t, the models that changed the element
    merge      d      = d_t of the only model where c = 1, the mean of the c that changed it
                      where c > 1, 0 where c = 0
    return     theta_0 + d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra import overlap
from mergekit_ft.contract import About, Block, Operator, Place, shared


class Ram(Operator):
    """Average what several models changed, keep whole what only one did."""

    epsilon: float = shared(1e-5, ge=0, description="changes up to this size count as none")

    def scratch(self, k: int) -> int:
        """Return the rows for counts and masks."""
        return 2

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the only model, where each of its changes counts."""
        return 0 if k == 1 and self.epsilon == 0.0 else None

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        count, spare = block.scratch[:2]
        deltas = overlap.changes(block, self.epsilon, count, spare)
        for delta in deltas[1:]:
            deltas[0].add_(delta)
        return deltas[0].div_(count.clamp_(min=1))

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64."""
        deltas = overlap.reference_changes(base, tuned, self.epsilon)
        return torch.sum(deltas, 0) / (deltas != 0).sum(0).clamp(min=1)
