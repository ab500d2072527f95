"""LiNeS, layer-increasing network scaling (Wang et al. 2024, arXiv:2410.17146, equation 1).

For the delta tau of one tuned model, or of a merge (under `then:`), of L blocks l = 1 .. L:

    scale      lambda(l)  = alpha + beta (l - 1) / (L - 1)      (L = 1: alpha + beta)
    return     theta_0(l) + lambda(l) tau(l)

Tensors outside the blocks get alpha, or what `embed`, `norm` and `head` say. `gamma` is short for
alpha = gamma, beta = 1 - gamma. `alpha: auto` is, over the whole model of T tuned ones,

    alpha      = (1/T) |sum_t tau_t|_1 / |tau|_1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from mergekit_ft.algebra.cells import l1_norms, totals
from mergekit_ft.algebra.deltas import subtract_base
from mergekit_ft.contract import About, Adjustment, Block, Measure, Place, Survey, setting
from mergekit_ft.errors import OperatorError

Outside = Literal["alpha", "last", "keep", "zero"]


class Lines(Adjustment):
    """Scale the delta of each layer by a line in its depth."""

    tuned: ClassVar[tuple[int, int | None]] = (1, 1)

    alpha: float | Literal["auto"] | None = setting(
        None, description="factor of the first block; auto (under then:) keeps the mean L1 norm"
    )
    beta: float | None = setting(None, description="added to alpha at the last block")
    gamma: float | None = setting(None, description="short for alpha: gamma, beta: 1 - gamma")
    embed: Outside = setting(
        "alpha", description="factor of embeddings: alpha, last (alpha + beta), keep (1) or zero"
    )
    norm: Outside = setting("alpha", description="the same for norms outside the blocks")
    head: Outside = setting("alpha", description="the same for the output head")
    compat: bool = setting(
        False, description="find the block number as the released code does, right or wrong"
    )

    @model_validator(mode="after")
    def _one_line_is_given(self) -> Lines:
        if (self.gamma is None) == (self.alpha is None) or (self.alpha is None) != (
            self.beta is None
        ):
            raise ValueError("give either alpha and beta, or gamma alone")
        return self

    def scratch(self, k: int) -> int:
        """Return the row that the sum of deltas needs."""
        return 2

    def factor(self, name: str, place: Place, alpha: float = 1.0) -> float:
        """Return lambda for a tensor; `alpha` stands for auto: of one model alone it is 1."""
        first, slope = self._line(alpha)
        depth = _released_depth(name, place) if self.compat else place.depth
        if depth is not None:
            return first + slope * depth
        policy = {"embedding": self.embed, "norm": self.norm, "head": self.head}.get(place.role)
        return {"last": first + slope, "keep": 1.0, "zero": 0.0}.get(policy or "alpha", first)

    def _line(self, alpha: float) -> tuple[float, float]:
        if self.gamma is not None:
            return self.gamma, 1.0 - self.gamma
        first = alpha if isinstance(self.alpha, str) or self.alpha is None else self.alpha
        return first, self.beta or 0.0

    def table(self, name: str, place: Place) -> dict[str, Any]:
        """Return the parameters and lambda, in terms of alpha where that is still to be found."""
        at_zero, at_one = (self.factor(name, place, alpha) for alpha in (0.0, 1.0))
        found = at_zero if at_zero == at_one else f"alpha + {at_zero:.6g}"
        return {**super().table(name, place), "factor": found}

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the tuned model where lambda is 1, the base where it is 0."""
        return {1.0: 0, 0.0: -1}.get(self.factor(name, place))

    def neutral(self, name: str, place: Place) -> bool:
        """Say whether lambda is 1 here."""
        return self.alpha != "auto" and self.factor(name, place) == 1.0

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the scaled delta of the one tuned model."""
        delta = subtract_base(block.tuned, block.base)[0]
        return delta.mul_(self.factor(block.name, block.place))

    def follow(self, about: About) -> Survey:
        """Find alpha, where it is auto: the ratio of two L1 norms over the whole model."""
        if self.alpha != "auto":
            return 1.0
        measures = Measure(_norm_of_sum, cells=True), Measure(_norm_of_merged, True, merged=True)
        (raw,), (merged,) = map(totals, (yield measures))
        if merged == 0.0:
            raise OperatorError("lines: alpha: auto divides by the merged delta, which is zero")
        if not (math.isfinite(raw) and math.isfinite(merged)):
            raise OperatorError(
                "lines: alpha: auto cannot be found, for a delta holds NaN or Inf; give alpha as a "
                "number, and the merge names the element"
            )
        return raw / merged / len(about.ids)

    def adjust(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the scaled delta of a merge."""
        assert block.delta is not None
        return block.delta.mul_(self.factor(block.name, block.place, finding))

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the scaled delta of the one tuned model in float64."""
        return self.factor(about.name, about.place) * (tuned[0] - base)

    def reference_adjust(self, delta: Tensor, about: About) -> Tensor:
        """Return the scaled delta of a merge in float64."""
        return self.factor(about.name, about.place, about.finding) * delta


def _released_depth(name: str, place: Place) -> float | None:
    """Return the depth that github.com/wang-kee/LiNeS finds: the least i with `.i.` in the name."""
    found = (i for i in range(place.layers) if f".{i}." in name)
    layer = next(found, None)
    return None if layer is None else replace(place, layer=layer).depth


def _norm_of_sum(block: Block) -> Tensor:
    """Return (cells, 1): the L1 norm of the sum of the raw deltas."""
    total, delta = block.scratch[0].zero_(), block.scratch[1]
    for row in block.tuned:
        total.add_(torch.sub(row, block.base, out=delta))
    return l1_norms([total])


def _norm_of_merged(block: Block) -> Tensor:
    """Return (cells, 1): the L1 norm of the merged delta."""
    assert block.delta is not None
    return l1_norms([block.delta])
