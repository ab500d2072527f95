"""Fusion within `generate` of transformers: a logits processor that asks the small models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mergekit_ft.errors import OperatorError
from mergekit_ft.fusion.speaking import Heard, Rule, Searched, fused
from mergekit_ft.models.speaker import Speaker


class FusionProcessor(LogitsProcessor):
    """Moves what a model says at each step by what tuning did to small models.

    For `model.generate(..., logits_processor=[FusionProcessor(...)])`, before processors that ban
    or bend. Without `small` the experts were tuned from the model itself. `pad` is the token by
    which prompts of a batch are filled up on the left. Caches of the small models follow the texts
    as they grow, beams included; a text that is no continuation is read anew.
    """

    def __init__(
        self,
        experts: Mapping[str, Speaker],
        rule: Rule | None = None,
        *,
        small: Speaker | None = None,
        pad: int | None = None,
        heard: Heard | None = None,
    ) -> None:
        if not experts:
            raise OperatorError("no expert is given, so nothing would be moved")
        self.rule, self.pad, self.heard = rule or Searched(), pad, heard
        self.has_small = small is not None
        self.speakers = [*([] if small is None else [small]), *experts.values()]
        self._seen: Tensor | None = None  # (b, n) what the states have read
        self._states: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (b, vocabulary) fused log-probabilities of (b, n) texts and the model's logits."""
        said = [scores.float(), *self._said(input_ids)]
        found, factors = fused(said, self.rule, has_small=self.has_small)
        if self.heard is not None:
            self.heard(torch.arange(len(scores)), factors)
        whole = torch.full_like(scores, -torch.inf)
        whole[:, : found.shape[-1]] = found.to(scores.dtype)
        return whole

    def _said(self, tokens: Tensor) -> Sequence[Tensor]:
        """Return each small model's (b, vocabulary) logits of the next token."""
        order = self._order(tokens)
        if order is None:
            mask = torch.ones_like(tokens)
            if self.pad is not None:
                mask = ((tokens != self.pad).cumsum(dim=1) > 0).long()
            pairs = [speaker.begin(tokens, mask) for speaker in self.speakers]
        else:
            if not torch.equal(order, torch.arange(len(order))):
                both = zip(self.speakers, self._states, strict=True)
                self._states = [speaker.keep(state, order) for speaker, state in both]
            both = zip(self.speakers, self._states, strict=True)
            pairs = [speaker.step(state, tokens[:, -1]) for speaker, state in both]
        self._seen, self._states = tokens.clone(), [state for _, state in pairs]
        return [logits for logits, _ in pairs]

    def _order(self, tokens: Tensor) -> Tensor | None:
        """Return which of the rows seen each row goes on from by a token; None: not all do."""
        seen = self._seen
        if seen is None or tokens.shape[1] != seen.shape[1] + 1:
            return None
        before = tokens[:, :-1]
        if before.shape == seen.shape and torch.equal(before, seen):
            return torch.arange(len(tokens))
        same = (before[:, None] == seen[None]).all(dim=-1)  # (b, rows seen)
        return same.long().argmax(dim=1).cpu() if bool(same.any(dim=1).all()) else None
