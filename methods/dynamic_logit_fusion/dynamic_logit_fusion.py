"""Dynamic logit fusion (Fan et al. 2024, arXiv:2406.15480), its weights fitted beforehand.

With logits M of the model that is moved, M^S of a small base and M^S_t of small experts:

    fused    P_a = softmax(M + sum_t a_t d_t),   d_t = M^S_t - M^S

and one a for all places y_n of calibration texts, in the box [low, high]^k:

    nll      min  mean_n -log P_a(y_n)            + ridge/2 |a - centre|^2     (ours; convex)
    kl       min  mean_n KL(teacher_n || P_a,n)   + ridge/2 |a - centre|^2     (ours; convex)
    dlf      by place, over the paper's grid and one expert at a time:
             min  sum_t [KL(P_a||P) - KL(Q_t||Q)]^2 + [KL(P||P_a) - KL(Q||Q_t)]^2
             then a_t = its mean where t was the best x how often it was        (ours; untested)

For nll and kl:  gradient_t = mean E_a[d_t] - E_target[d_t],  Hessian_ts = mean Cov_a(d_t, d_s).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergekit_ft.algebra.boxes import minimise
from mergekit_ft.algebra.fused import exact_sum, fuse, moments, shifts
from mergekit_ft.algebra.matching import matched
from mergekit_ft.fusing import Fitted, Fusion, Heard, Hearing

STEP = 0.1  # of the paper's grid
FLAT = 1e-10  # curvature below which an expert tells nothing


class DynamicLogitFusion(Fusion):
    """One weight for each expert, by calibration texts."""

    objective: Literal["nll", "kl", "dlf"] = Field("nll", description="what is least at the fit")
    low: float | None = Field(0.0, description="least weight; null: no bound")
    high: float | None = Field(2.0, description="largest weight; null: no bound")
    ridge: float = Field(1e-3, ge=0, description="of nll and kl: how strongly a is held to centre")
    centre: float = Field(0.0, description="of nll and kl: where the ridge holds a to")

    @model_validator(mode="after")
    def _in_order(self) -> DynamicLogitFusion:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.objective == "dlf" and None in (self.low, self.high):
            raise ValueError("dlf searches a grid, which needs both low and high")
        if self.objective == "dlf" and {"ridge", "centre"} & self.model_fields_set:
            raise ValueError("ridge and centre have no effect on dlf, which searches a grid")
        return self

    @property
    def taught(self) -> bool:
        """Say whether it needs a teacher: kl does."""
        return self.objective == "kl"

    def fit(self, hearing: Hearing) -> Fitted:
        """Return the weights, with curvature, bounds met and steps."""
        if self.objective == "dlf":
            return self._matched(hearing)
        k = hearing.experts
        low = torch.full((k,), -torch.inf if self.low is None else self.low, dtype=torch.float64)
        high = torch.full((k,), torch.inf if self.high is None else self.high, dtype=torch.float64)
        centre = torch.full((k,), self.centre, dtype=torch.float64)

        def loss(alpha: Tensor) -> tuple[float, Tensor, Tensor]:
            value, gradient, hessian = self._loss(hearing, alpha)
            away = alpha - centre
            curved = hessian + self.ridge * torch.eye(k, dtype=torch.float64)
            held = 0.5 * self.ridge * float(away @ away)
            return value + held, gradient + self.ridge * away, curved

        found = minimise(loss, centre, low, high)
        plain = found.hessian - self.ridge * torch.eye(k, dtype=torch.float64)
        at = [bool(a in (x, y)) for a, x, y in zip(found.at, low, high, strict=True)]
        facts = {
            "loss": found.value,
            "steps": found.steps,
            "gradient": found.gradient.tolist(),
            "hessian_eigenvalues": torch.linalg.eigvalsh(plain).tolist(),
            "at_bound": at,
            "flat": [bool(c <= FLAT) for c in plain.diagonal()],
        }
        return Fitted(tuple(found.at.tolist()), facts)

    def _loss(self, hearing: Hearing, alpha: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean loss, its gradient (k,) and its Hessian (k, k)."""
        k = hearing.experts
        sums = exact_sum(self._rows(hearing, alpha)) if k else torch.zeros(1)
        total, rest = sums[0], sums[1:] / sums[0]
        assert total > 0
        return float(rest[0]), rest[1 : k + 1], rest[k + 1 :].reshape(k, k)

    def _rows(self, hearing: Hearing, alpha: Tensor) -> Iterator[Tensor]:
        """Yield (n, 2 + k + k^2): weight, and by it loss, gradient and Hessian of each place."""
        for heard in hearing:
            moves = shifts(heard.tuned, heard.small)
            logs = fuse(heard.base, moves, alpha)
            means, spread = moments(logs, moves)
            loss, target = self._target(heard, logs, moves)
            row = torch.cat([loss[:, None], means - target, spread.flatten(1)], dim=1)
            weights = heard.weights.double()[:, None]
            yield torch.cat([weights, weights * row], dim=1)

    def _target(self, heard: Heard, logs: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n,) the loss of each place and (n, k) the moves that are expected there."""
        if self.objective == "nll":
            at = heard.targets[:, None]
            picked = moves.gather(2, at.expand(len(moves), -1, 1))[:, :, 0].T
            return -logs.gather(1, at)[:, 0], picked
        assert heard.teacher is not None
        wanted = torch.log_softmax(heard.teacher.double(), -1)
        chances = wanted.exp()
        loss = (chances * (wanted - logs)).sum(-1)
        return loss, torch.einsum("nv,knv->nk", chances, moves)

    def _matched(self, hearing: Hearing) -> Fitted:
        assert self.low is not None and self.high is not None
        count = round((self.high - self.low) / STEP) + 1
        grid = torch.linspace(self.low, self.high, count, dtype=torch.float64)
        rows = []
        for heard in hearing:
            words = (heard.base, heard.small, heard.tuned)
            base, small, tuned = (torch.log_softmax(x.double(), -1) for x in words)
            which, factor = matched(base, small, tuned, grid)
            chosen = torch.nn.functional.one_hot(which, hearing.experts).double()
            weights = heard.weights.double()[:, None]
            rows.append(
                weights
                * torch.cat([torch.ones_like(weights), chosen, chosen * factor[:, None]], dim=1)
            )
        sums = exact_sum(rows)
        share, alpha = (sums[1:] / sums[0]).reshape(2, -1)
        facts: dict[str, Any] = {"chosen": share.tolist(), "grid": len(grid)}
        return Fitted(tuple(alpha.tolist()), facts)
