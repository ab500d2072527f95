"""CorDA (Yang et al. 2024, arXiv:2406.05223): factors of low rank cut out of W by what it is fed.

With X the inputs of a linear layer on calibration rows:

    C    = mean over rows of X^T X, each row's X divided by |max X|
    C'   = C + d mean(diag C) I,    d doubled from 0.01 until C' can be inverted
    svd(W C') = U S V^T
    B    = U sqrt(S),  A = sqrt(S) V^T C'^-1,   of r components

IPM takes the first r (calibrate on the task), KPM the last (calibrate on what is to be kept).
W - B A is frozen, A and B train. The decomposition is peft's; what comes out is the change
B A - B0 A0 to W itself, as an ordinary LoRA of rank 2 r.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ft.adapting import Adapted, Places
from mergekit_ft.learning import Adaptation, Misfit, Selection, Subject, Tuner


class Corda(Tuner):
    """Factors cut out of each matrix by the inputs that it is given train."""

    learning_rate: ClassVar[float] = 2e-5  # the authors'
    adapts: ClassVar[bool] = True
    residual: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("adapter", "full", "delta")

    rank: int = Field(128, ge=1, description="r, columns of B and rows of A; the output has twice")
    alpha: float | None = Field(
        None, gt=0, description="the product counts alpha / rank; None: rank"
    )
    targets: tuple[str, ...] | None = Field(
        None, description="layers, by name or pattern: q_proj, '*.mlp.*'; None: all but heads"
    )
    mode: Literal["ipm", "kpm"] = Field(
        "ipm", description="ipm: the components that the rows need most; kpm: least"
    )
    samples: int = Field(256, ge=1, description="calibration rows")
    calibration: str | None = Field(
        None, description="JSONL file of calibration rows; None: training rows"
    )

    @property
    def files(self) -> tuple[str, ...]:
        """Return the calibration file, if there is one."""
        return () if self.calibration is None else (self.calibration,)

    def adapted(self, subject: Subject) -> Adaptation:
        """Decompose every matrix; the factors go into the model, and the rest stays."""
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        places = Places(subject, self.targets)
        for name in places.changes:
            shape = list(subject.parameters[name].shape)
            if self.rank > min(shape):
                raise Misfit(f"rank {self.rank} is more than {name} has, {shape}", ("rank",))
        words: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "fan_in_fan_out": places.transposed,
        }
        config = LoraConfig(
            **words,
            target_modules=list(places.chosen),
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=self.mode),
        )
        preprocess_corda(subject.model, config, run_model=lambda: self._run(subject))
        return _Cut(get_peft_model(subject.model, config), places, words)

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose every factor."""
        return Selection(whole=tuple(subject.parameters))

    def _run(self, subject: Subject) -> None:
        """Run the calibration rows, one at a time and without padding: the hooks see all of X."""
        found = (
            subject.batches(1) if self.calibration is None else subject.rows_of(self.calibration)
        )
        device, seen = next(subject.model.parameters()).device, 0
        rows = (row[kept.bool()] for b in found for row, kept in _rows(b))
        for row in islice(rows, self.samples):
            subject.model(input_ids=row[None].to(device), use_cache=False)
            seen += 1
        if seen < self.samples:
            told = f"{seen} rows are fewer than the {self.samples} to calibrate on"
            raise Misfit(told, ("samples",))


def _rows(batch: Any) -> Any:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


class _Cut(Adapted):
    """Factors that were cut out of the weights: what counts is how far they moved."""

    def __init__(self, model: Any, places: Places, words: dict[str, Any]) -> None:
        super().__init__(model, places, words)
        start = super().tensors()
        self._start = {name: tensor.clone() for name, tensor in start.items()}
        double = {"r": 2 * words["r"], "lora_alpha": 2 * words["lora_alpha"]}
        self.words = {**words, **double}

    def moved(self) -> bool:
        """Say whether some factor is not what it began as."""
        now = super().tensors()
        return any(not torch.equal(now[name], self._start[name]) for name in now)

    def tensors(self) -> dict[str, Tensor]:
        """Return B A - B0 A0 as [B, -B0] [A; A0]."""
        found = super().tensors()
        return {
            name: torch.cat([now, self._start[name]], 0)
            if "lora_A" in name
            else torch.cat([now, -self._start[name]], 1)
            for name, now in found.items()
        }
