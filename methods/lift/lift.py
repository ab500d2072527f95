"""LIFT, low-rank informed sparse fine-tuning (Liu et al. 2025, arXiv:2506.00772, Algorithm 1).

Of each linear layer's W (m, n), heads apart:

    filter    W_R  = the truncation of W to its `filter_rank` largest singular values
    mask      the k = min(r (m + n), m n) largest |W_R|, matrix by matrix  (r = `rank`)
    step      m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2   on the masked entries alone
              W -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
    refresh   after every `interval` steps the mask is made anew from the weights as they are;
              entries that stay keep m and v, new ones begin at 0, t goes on
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from mergekit_ft.algebra.topk import largest, narrow
from mergekit_ft.learning import Pace, Selection, Subject, Tuner


class Lift(Tuner):
    """Sparse fine-tuning of the principal entries of each matrix."""

    learning_rate: ClassVar[float] = 1e-4
    gives: ClassVar[tuple[str, ...]] = ("delta", "full")
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    epsilon: ClassVar[float] = 1e-6
    sparse: ClassVar[bool] = True

    rank: int = Field(128, ge=1, description="r of the budget r (m + n): a LoRA's of that rank")
    filter_rank: int | None = Field(None, ge=1, description="R of the filter; None: rank")
    interval: int = Field(200, ge=1, description="steps between two masks")

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose the principal entries of every matrix."""
        found = {name: self._mask(w.detach()) for name, (_, w) in subject.matrices().items()}
        return Selection(entries=found)

    def due(self, step: int, steps: int) -> bool:
        """Say whether an interval ends, and more steps follow."""
        return step % self.interval == 0 and step < steps

    def reselect(self, subject: Subject, phase: int, step: int, now: Selection) -> Selection:
        """Choose by the weights as they are now."""
        return self.select(subject, phase)

    def _mask(self, weight: Tensor) -> Tensor:
        k = min(self.rank * sum(weight.shape), weight.numel())
        low = _truncated(weight.float(), self.filter_rank or self.rank)
        return narrow(largest({"": low.abs_}, k)[""], weight.numel())

    def optimizer(self, groups: Iterable[dict[str, Any]], pace: Pace) -> Optimizer:
        """Return the paper's Adam: its epsilon is added before the bias is corrected."""
        return Adam(groups, pace)


def _truncated(weight: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a matrix of this rank, by its exact SVD."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    low: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return low


class Adam(Optimizer):
    """Adam whose epsilon stands beside sqrt(v), without the correction of v's bias."""

    def __init__(self, groups: Iterable[dict[str, Any]], pace: Pace) -> None:
        super().__init__(
            groups, {"lr": pace.rate, "betas": pace.betas, "eps": pace.epsilon, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; decoupled weight decay first."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        state["step"] += 1
        t = int(state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        mean = state["exp_avg"].lerp_(gradient, 1 - b1)
        square = state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        rate = group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t)
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate)
