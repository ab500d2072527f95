"""SaRA, progressive sparse low-rank adaptation (Hu et al. 2024, arXiv:2409.06633).

    mask         M = |theta_0| < tau, of every parameter
    train        the entries in M, by AdamW
    penalty      lambda ||theta . M||_* of one random matrix a step, by its subgradient U V^T . M
                 (of matrices with both sides over 64 and more than 100 entries in M)
    progressive  after `progressive` of the steps, M becomes M and |theta| < tau

`tau` is absolute in the paper (for diffusion models); `density` takes the smallest share instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergekit_ft.algebra.draws import drawn
from mergekit_ft.algebra.topk import narrow, smallest
from mergekit_ft.learning import Selection, Subject, Tuner

LEAST_SIDE, LEAST_ENTRIES = 64, 100  # of a matrix that the penalty is taken of


class Sara(Tuner):
    """Sparse fine-tuning of the entries that matter least in the base."""

    learning_rate: ClassVar[float] = 5e-4  # near the paper's 1e-3 exp(-350 tau) at tau = 2e-3
    gives: ClassVar[tuple[str, ...]] = ("delta", "full")
    sparse: ClassVar[bool] = True

    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of all entries that train; 0.05 where tau is not given"
    )
    tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="entries below this magnitude train, instead of a share"
    )
    progressive: float = Field(
        0.5, ge=0, lt=1, description="share of the steps after which entries that grew stop; 0: off"
    )
    rank_loss: float = Field(5e-4, ge=0, description="lambda of the nuclear norm")

    @model_validator(mode="after")
    def _one_size(self) -> Sara:
        if self.density is not None and self.tau is not None:
            raise ValueError("density and tau both say which entries train; give one")
        return self

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose the entries that are small in the base."""
        if self.tau is not None:
            found = {
                name: (parameter.detach().float().abs().flatten() < self.tau).nonzero().flatten()
                for name, parameter in subject.parameters.items()
            }
        else:
            total = sum(parameter.numel() for parameter in subject.parameters.values())
            scores = {name: parameter.detach for name, parameter in subject.parameters.items()}
            found = smallest(scores, max(1, int((self.density or 0.05) * total)))
        return Selection(entries=_narrowed(found, subject))

    def due(self, step: int, steps: int) -> bool:
        """Say whether entries that grew stop training now."""
        return bool(self.progressive) and step == math.floor(self.progressive * steps)

    def reselect(self, subject: Subject, phase: int, step: int, now: Selection) -> Selection:
        """Keep the entries that are still small."""
        tau = self._tau(subject, now)
        kept = {}
        for name, indices in now.entries.items():
            values = _at(subject.parameters[name], indices)
            kept[name] = indices[(values.float().abs() < tau).to(indices.device)]
        return Selection(entries={name: left for name, left in kept.items() if len(left)})

    def _tau(self, subject: Subject, now: Selection) -> float:
        """Return the threshold; of a share, just above the largest magnitude that was chosen."""
        if self.tau is not None:
            return self.tau
        most = max(
            float(_at(subject.origin(name), indices).abs().max())
            for name, indices in now.entries.items()
        )
        return math.nextafter(most, math.inf) if most else 1e-30

    def penalties(
        self, subject: Subject, phase: int, step: int, now: Selection
    ) -> Mapping[str, Tensor]:
        """Return the subgradient of the nuclear norm of one matrix, drawn by the step."""
        able = [name for name, found in now.entries.items() if _able(subject, name, found)]
        if not self.rank_loss or not able:
            return {}
        (name,) = drawn(able, 1, subject.seed, step)
        weight, indices = subject.parameters[name].detach().float(), now.entries[name]
        masked = torch.zeros_like(weight)
        at = indices.to(weight.device, torch.int64)
        masked.view(-1)[at] = weight.reshape(-1)[at]
        u, s, vh = torch.linalg.svd(masked, full_matrices=False)
        rank = int((s > s[0] * max(weight.shape) * torch.finfo(torch.float32).eps).sum())
        slope = (u[:, :rank] @ vh[:rank]).reshape(-1)[at]
        return {name: slope.mul_(self.rank_loss)}


def _able(subject: Subject, name: str, indices: Tensor) -> bool:
    shape = subject.parameters[name].shape
    return len(shape) == 2 and min(shape) > LEAST_SIDE and len(indices) > LEAST_ENTRIES


def _at(values: Tensor, indices: Tensor) -> Tensor:
    return values.detach().reshape(-1).index_select(0, indices.to(values.device))


def _narrowed(found: Mapping[str, Tensor], subject: Subject) -> dict[str, Tensor]:
    sizes = {name: subject.parameters[name].numel() for name in found}
    return {name: narrow(part, sizes[name]) for name, part in found.items() if len(part)}
