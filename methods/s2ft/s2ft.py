"""S2FT, structured sparse fine-tuning (Yang et al. 2024, arXiv:2412.06289).

    budget   int(ratio x pool) units of each projection, the pool over all layers together:
             heads of v (rows) and o (columns), channels of u (rows) and d (columns)
    select   at random (the paper's choice), or those that score most or least by `selector`
    train    the selected rows and columns alone, by Adam; everything else is frozen

The paper permutes the model so that the selected units lie together; the gradient of the entries
where they stand is the same, so here nothing moves, and grouped key-value heads are counted as
heads of v.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergekit_ft.algebra.topk import narrow
from mergekit_ft.learning import Selection, Subject, Tuner
from mergekit_ft.methods.s2ft.units import Units, by_activation, by_gradient, by_weight, found

Ratio = Annotated[float, Field(ge=0, le=1)]
Selector = Literal["random", "weight", "activation", "weight_activation", "gradient"]


class S2ft(Tuner):
    """Structured sparse fine-tuning of heads and channels."""

    learning_rate: ClassVar[float] = 2e-4  # the authors' for commonsense; 1e-3 for mathematics
    gives: ClassVar[tuple[str, ...]] = ("delta", "full")
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    sparse: ClassVar[bool] = True

    v_ratio: Ratio = Field(0.0, description="share of the key-value heads, whose rows of v train")
    o_ratio: Ratio = Field(0.0, description="share of the heads, whose columns of o train")
    u_ratio: Ratio = Field(0.0, description="share of the channels, whose rows of up train")
    d_ratio: Ratio = Field(0.03, description="share of the channels, whose columns of down train")
    selector: Selector = Field("random", description="by what units are chosen")
    order: Literal["largest", "smallest"] = Field("largest", description="which scores; ours")
    calibration: int = Field(16, ge=1, description="rows of data that scores are taken over")

    @model_validator(mode="after")
    def _something(self) -> S2ft:
        if not any((self.v_ratio, self.o_ratio, self.u_ratio, self.d_ratio)):
            raise ValueError("every ratio is 0, so nothing would train")
        return self

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose units of each projection over all layers."""
        ratios = {"v": self.v_ratio, "o": self.o_ratio, "u": self.u_ratio, "d": self.d_ratio}
        entries: dict[str, Tensor] = {}
        for number, (projection, ratio) in enumerate(ratios.items()):
            if not ratio:
                continue
            units = found(subject, projection)
            scores = self._scores(units, subject, number)
            for one, chosen in zip(units, self._chosen(scores, ratio), strict=True):
                if len(chosen):
                    entries[one.name] = narrow(one.entries(chosen), one.weight.numel())
        return Selection(entries=entries)

    def _scores(self, units: list[Units], subject: Subject, number: int) -> list[Tensor]:
        """Return (count,) scores of each matrix's units, the higher the sooner chosen."""
        if self.selector == "random":
            dice = torch.Generator().manual_seed(subject.seed * 4 + number)
            return [torch.rand(one.count, generator=dice, dtype=torch.float64) for one in units]
        rows = self.calibration
        if self.selector == "weight":
            scores = list(by_weight(units))
        elif self.selector == "activation":
            scores = list(by_activation(units, subject, rows))
        elif self.selector == "gradient":
            scores = list(by_gradient(units, subject, rows))
        else:
            pairs = zip(by_weight(units), by_activation(units, subject, rows), strict=True)
            scores = [weight * activation for weight, activation in pairs]
        return scores if self.order == "largest" else [-score for score in scores]

    def _chosen(self, scores: list[Tensor], ratio: float) -> list[Tensor]:
        """Return the indices of the units chosen, by matrix; of equal scores the first."""
        sizes = [len(score) for score in scores]
        order = torch.cat(scores).sort(descending=True, stable=True).indices
        picked = torch.zeros(sum(sizes), dtype=torch.bool)
        picked[order[: int(ratio * sum(sizes))]] = True
        return [part.nonzero().flatten() for part in torch.split(picked, sizes)]
