"""Whatever gives logits of the next token: a model, or several that speak as one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mergekit_ft.errors import OperatorError


class Speaker(Protocol):
    """What is asked for the logits of next tokens.

    Masks are 1 where there is a token; those of `read` end in padding, those of `begin` start with
    it. A state is the speaker's own; `step` uses it up and returns the next.
    """

    tokenizer: Any
    most: int | None  # tokens that fit into it, prompt and answer together; None: no bound
    ends: frozenset[int]  # tokens that end what it says

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Return (b, n, vocabulary) float32 logits of the token after each of (b, n).

        Of places `at`, (b, n) booleans, alone where they are given: (m, vocabulary), row by row.
        """

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Return (b, vocabulary) float32 logits of the token after the prompts, and a state."""

    def step(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the same after one more token, (b,), of each."""

    def keep(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some of its rows, (m,) indices."""


@dataclass
class Cached:
    """Where a model stands: its cache, and how long each row is."""

    cache: Any
    mask: Tensor  # (b, n) padding on the left
    lengths: Tensor  # (b,) tokens of each row


class ModelSpeaker:
    """A transformers model for text, with its cache of keys and values."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str = "the model") -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.device = next(model.parameters()).device
        config: Any = model.config
        self.most: int | None = getattr(config, "max_position_embeddings", None)
        self.ends = _ends(model, tokenizer)
        self._placed = "position_ids" in inspect.signature(model.forward).parameters
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @torch.no_grad()
    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Return (b, n, vocabulary) float32 logits of next tokens; `at` places (m, vocabulary)."""
        where = torch.ones_like(mask, dtype=torch.bool) if at is None else at
        words = {"input_ids": tokens, "attention_mask": mask}
        logits, _ = self._logits(where, words, use_cache=False)
        if at is not None:
            return self._sound(logits)
        return self._sound(logits.view(*tokens.shape, -1), mask.bool())

    @torch.no_grad()
    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Cached]:
        """Return (b, vocabulary) float32 logits of the token after the prompts, and a state."""
        mask = mask.to(self.device)
        return self._forward(tokens.to(self.device), None, mask, positions(mask))

    @torch.no_grad()
    def step(self, state: Cached, tokens: Tensor) -> tuple[Tensor, Cached]:
        """Return the same after one more token, (b,), of each."""
        mask = torch.cat([state.mask, torch.ones_like(state.mask[:, :1])], dim=1)
        column = tokens.to(self.device)[:, None]
        return self._forward(column, state.cache, mask, state.lengths[:, None])

    def keep(self, state: Cached, rows: Tensor) -> Cached:
        """Return the state of some of its rows, (m,) indices."""
        rows = rows.to(self.device)
        state.cache.batch_select_indices(rows)
        return Cached(state.cache, state.mask[rows], state.lengths[rows])

    def _forward(
        self, tokens: Tensor, cache: Any, mask: Tensor, places: Tensor
    ) -> tuple[Tensor, Cached]:
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[:, -1] = True
        words = {"input_ids": tokens, "attention_mask": mask}
        if self._placed:  # others go by the mask
            words["position_ids"] = places
        logits, said = self._logits(last, words, past_key_values=cache, use_cache=True)
        return self._sound(logits), Cached(said.past_key_values, mask, mask.sum(dim=1))

    def _logits(self, at: Tensor, words: dict[str, Tensor], **more: Any) -> tuple[Tensor, Any]:
        """Return (m, vocabulary) float32 logits at some places: the head sees no others."""
        where = at.to(self.device)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][where], *given[1:]))
        try:
            said = self.model(**{key: t.to(self.device) for key, t in words.items()}, **more)
        finally:
            hook.remove()
        return said.logits.float(), said

    def _sound(self, logits: Tensor, where: Tensor | None = None) -> Tensor:
        looked_at = logits if where is None else logits[where.to(logits.device)]
        if bool(torch.isnan(looked_at).any()):
            raise OperatorError(
                f"{self.name} gives logits that are not numbers; `mergekit-ft inspect` finds "
                "weights that are not"
            )
        return logits


def positions(mask: Tensor) -> Tensor:
    """Return (b, n) the position of each token in its row, padding apart."""
    return (mask.long().cumsum(dim=1) - 1).clamp_(min=0)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the generation config."""
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
