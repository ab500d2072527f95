"""Masked Thought fine-tuning (Chen et al. 2024, arXiv:2403.02178).

    for each scored token i of the input:  w_i becomes noise with probability p
    L = -(1/N) sum_t w_t log p(y_t | the corrupted input before t)

Labels stay as they are, and prompts are never touched. p rises from 0 to `share` over the first
`warmup` of the steps. Noise is a token of the vocabulary that the data do not use, so that no row
is added and the result still merges; or a random one.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ft.learning import Batch, Objective, Said


class MaskedThought(Objective):
    """Likelihood of the answer after a corrupted one."""

    share: float = Field(0.4, ge=0, lt=1, description="of scored tokens hidden; 0.4 for GSM8K")
    warmup: float = Field(2 / 3, ge=0, le=1, description="share of the steps until it is reached")
    noise: Literal["token", "random"] = Field("token", description="what is shown instead")
    token: int | None = Field(
        None, ge=0, description="the id shown; None: the highest that the data do not use"
    )
    vocabulary: int | None = Field(
        None, ge=1, description="ids that random noise is drawn from; None: all"
    )

    def fitted(self, vocabulary: int, used: Set[int]) -> MaskedThought:
        """Return the objective with its noise chosen for a model and its data."""
        unused = next((i for i in reversed(range(vocabulary)) if i not in used), None)
        if self.noise == "token" and self.token is None and unused is None:
            raise ValueError("the data use every id of the vocabulary; name `token:`")
        if self.token is not None and self.token >= vocabulary:
            raise ValueError(f"token {self.token} is beyond the vocabulary's {vocabulary} rows")
        chosen = {"token": unused, "vocabulary": vocabulary}
        return self.model_copy(
            update={key: value for key, value in chosen.items() if getattr(self, key) is None}
        )

    def corrupted(self, batch: Batch, progress: float, dice: torch.Generator) -> Batch:
        """Return the input with some scored tokens hidden."""
        tokens, scored = batch["input_ids"], batch["labels"] != -100
        rate = self.share * (min(1.0, progress / self.warmup) if self.warmup else 1.0)
        hit = (torch.rand(tokens.shape, generator=dice) < rate).to(tokens.device) & scored
        return {**batch, "input_ids": torch.where(hit, self._noise(tokens, dice), tokens)}

    def _noise(self, tokens: Tensor, dice: torch.Generator) -> Tensor:
        if self.noise == "token":
            assert self.token is not None
            return torch.full_like(tokens, self.token)
        assert self.vocabulary is not None
        return torch.randint(self.vocabulary, tokens.shape, generator=dice).to(tokens.device)

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places."""
        return -(said.weights * said.log_probabilities()).sum()
