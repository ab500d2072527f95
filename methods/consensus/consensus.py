"""Consensus merging (Wang et al. 2024, arXiv:2405.07813, Eq. 4 to 6).

For task vectors  d_t = theta_t - theta_0  of T tuned models:

    merge      d     = sum_t d_t  (`merge: ties`: trimmed to `density`, those of the elected sign)
    mask       m_t   = |d_t| > lambda_t |d - d_t|    what task t needs of d  (`threshold`)
    consensus  c     = sum_t m_t >= k                what at least k tasks need
    return     theta_0 + alpha c d                   (`lambda`)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergekit_ft.algebra import selection
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.contract import (
    About,
    Block,
    Operator,
    Place,
    Share,
    Survey,
    per_model,
    setting,
    shared,
)

Threshold = Annotated[float, Field(ge=0)]
TRIM = 0.2  # share kept by TIES' trim (the paper's k = 20)
ROWS = 4  # of scratch: the merged delta, a sum, a copy, a count


class Consensus(Operator):
    """Keep of merged task vectors what at least k tasks need."""

    threshold: tuple[Threshold, ...] = per_model(
        0.4, description="lambda_t of the mask: larger, and fewer entries count as the task's"
    )
    k: int = shared(2, ge=0, description="tasks that must need an entry; 0: no mask")
    lambda_: float = shared(1.0, alias="lambda", description="alpha, factor of the merged delta")
    merge_by: Literal["ta", "ties"] = setting(
        "ta", alias="merge", description="how task vectors are merged: their sum, or TIES' sum"
    )
    density: Share | None = shared(
        None, description="share of entries kept by TIES' trim; 0.2 if not given"
    )
    scope: Literal["tensor", "model"] = setting(
        "tensor", description="rank entries for the trim within a tensor, or the whole model"
    )

    @model_validator(mode="after")
    def _only_ties_trims(self) -> Consensus:
        if self.merge_by == "ta" and (self.density is not None or self.scope == "model"):
            raise ValueError("density and scope are of TIES' trim, so they need merge: ties")
        return self

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        """Return the scope within which entries are ranked."""
        return self.scope if self._trims else "tensor"

    @property
    def _share(self) -> float:
        return TRIM if self.density is None else self.density

    @property
    def _trims(self) -> bool:
        return self.merge_by == "ties" and self._share < 1.0

    def scratch(self, k: int) -> int:
        """Return the rows that the merge needs, and selection where there is one."""
        return max(ROWS, selection.scratch(k)) if self._trims else ROWS

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the base where more tasks are asked for than there are; a lone model as it is."""
        if self.k > k or self.lambda_ == 0.0:
            return -1
        lone = k == 1 and self.lambda_ == 1.0 and not self._trims
        return 0 if lone else None

    def survey(self, about: About) -> Survey:
        """Find each model's cut, where task vectors are trimmed."""
        if not self._trims or not self._share:
            return None
        count = selection.count_for(self._share, about.numel)
        return (yield from selection.largest([count] * len(about.ids), _delta, about))

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the merged delta."""
        deltas = subtract_base(block.tuned, block.base)
        merged, spare, count = block.scratch[0], block.scratch[2], block.scratch[3].zero_()
        if self.merge_by == "ta":
            _sum(deltas, merged)
        else:
            self._ties(deltas, finding, block)
        for delta, threshold in zip(deltas, self.threshold, strict=True):
            torch.sub(merged, delta, out=spare).abs_().mul_(threshold)
            count.add_(torch.gt(delta.abs_(), spare, out=spare))
        return merged.mul_(count.ge_(self.k)).mul_(self.lambda_)

    def _ties(self, deltas: Tensor, cuts: Any, block: Block) -> None:
        """Put TIES' sum, of what is trimmed and has the elected sign, into the first row."""
        merged, total, copy = block.scratch[:3].unbind()
        total.zero_()
        for i in range(len(deltas)):
            total.add_(self._trimmed(deltas[i], cuts, i, block, copy))
        sign = torch.ge(total, 0, out=total).mul_(2).sub_(1)
        merged.zero_()
        for i in range(len(deltas)):
            agreeing = self._trimmed(deltas[i], cuts, i, block, copy).mul_(sign).clamp_(min=0)
            merged.add_(agreeing)
        merged.mul_(sign)

    def _trimmed(self, delta: Tensor, cuts: Any, i: int, block: Block, out: Tensor) -> Tensor:
        """Return a copy of a task vector, trimmed, in `out`."""
        out.copy_(delta)
        if not self._share:
            return out.zero_()
        if cuts is None or cuts[i] is None:
            return out
        return selection.keep(out, selection.Cut(*cuts[i]), block.first_cell)

    def same_everywhere(self) -> Any:
        """Return the density where the whole model is ranked at once."""
        return self._share if self._trims and self.scope == "model" else None

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the merged delta in float64; sorts, where `merge` counts."""
        deltas = [(x - base).flatten() for x in tuned]
        merged = torch.stack(self._reference_parts(deltas, about)).sum(0)
        need = [
            d.abs() > threshold * (merged - d).abs()
            for d, threshold in zip(deltas, self.threshold, strict=True)
        ]
        agreed = torch.stack(need).sum(0) >= self.k
        return (self.lambda_ * agreed * merged).view_as(base)

    def _reference_parts(self, deltas: list[Tensor], about: About) -> list[Tensor]:
        if self.merge_by == "ta":
            return deltas
        trimmed = [self._reference_trim(delta, about, i) for i, delta in enumerate(deltas)]
        sign = torch.where(torch.stack(trimmed).sum(0) >= 0, 1.0, -1.0).to(deltas[0].dtype)
        return [part * (part.sign() == sign) for part in trimmed]

    def _reference_trim(self, delta: Tensor, about: About, i: int) -> Tensor:
        if not self._trims or not self._share:
            return delta * (self._share > 0)
        if about.finding is not None:  # ranked within the whole model, by the survey
            cut = selection.Cut(*about.finding[i])
            return selection.keep(delta.clone(), cut, about.first_cell)
        count = selection.count_for(self._share, delta.numel())
        return selection.reference_keep(delta, count)


def _delta(block: Block, i: int) -> Tensor:
    """Return (n,) the delta of model i, in the first row of scratch."""
    return torch.sub(block.tuned[i], block.base, out=block.scratch[0])


def _sum(deltas: Tensor, out: Tensor) -> None:
    """Add up task vectors, in order."""
    out.copy_(deltas[0])
    for delta in deltas[1:]:
        out.add_(delta)
