"""Several models that speak as one: a large one, moved at each token as small ones were by tuning.

    P_a = softmax(base + sum_t a_t (expert_t - small))       logits of one place

The factors a_t stay as they are given (proxy tuning; weights that were fitted), or are searched at
each place, one expert at a time (dynamic logit fusion: Fan et al. 2024, arXiv:2406.15480).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mergekit_ft.algebra.shifting import USUAL, Bounds, How, moved, search
from mergekit_ft.models.speaker import Speaker

Heard = Callable[[Tensor, Tensor], None]  # (b,) rows of the batch, (b, experts) their factors


class Rule(Protocol):
    """How factors come about."""

    def factors(self, base: Tensor, small: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """Return (n, experts) float64 factors of (n, vocabulary) logits."""


@dataclass(frozen=True)
class Fixed:
    """The same factors everywhere."""

    alpha: tuple[float, ...]  # by expert

    def factors(self, base: Tensor, small: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """Return (n, experts) float64 factors of (n, vocabulary) logits."""
        given = torch.tensor(self.alpha, dtype=torch.float64, device=base.device)
        return given.expand(len(base), -1)


@dataclass(frozen=True)
class Searched:
    """The best expert at each place, as far as it was moved itself."""

    bounds: tuple[Bounds, ...] | None = None  # by expert; None: the paper's of all
    how: How = "bracket"

    def factors(self, base: Tensor, small: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """Return (n, experts) float64 factors of (n, vocabulary) logits."""
        found = search(base, small, tuned, self.bounds or [USUAL] * len(tuned), self.how)
        made = torch.zeros(len(base), len(tuned), dtype=torch.float64, device=base.device)
        return made.scatter_(1, found.expert[:, None], found.alpha[:, None])


@dataclass
class Standing:
    """Where the models stand, and which rows of the batch are left."""

    states: list[Any]
    rows: Tensor  # (b,)


class FusedSpeaker:
    """A `Speaker` made of others: the base's device is where logits are fused.

    All read the same tokens; one whose ids differ is a `Translated`. Without `small` the experts
    were tuned from the base, which is then asked once. `heard` is told the factors of each token.
    """

    def __init__(
        self,
        base: Speaker,
        experts: Mapping[str, Speaker],
        rule: Rule | None = None,
        *,
        small: Speaker | None = None,
        heard: Heard | None = None,
        name: str = "the fused models",
    ) -> None:
        self.names, self.rule, self.name = tuple(experts), rule or Searched(), name
        self.heard = heard
        self.has_small = small is not None
        self.speakers = [base, *([] if small is None else [small]), *experts.values()]
        self.tokenizer = base.tokenizer
        bounds = [s.most for s in self.speakers if s.most is not None]
        self.most = min(bounds) if bounds else None
        self.ends = frozenset().union(*(s.ends for s in self.speakers))

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Return (b, n, vocabulary) float32 logits of next tokens; `at` places (m, vocabulary)."""
        where = mask.bool() if at is None else at
        fused, _ = self._fused([s.read(tokens, mask, where) for s in self.speakers])
        if at is not None:
            return fused
        whole = fused.new_zeros(*tokens.shape, fused.shape[-1])
        whole[where.to(whole.device)] = fused
        return whole

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Standing]:
        """Return (b, vocabulary) float32 logits of the token after the prompts, and a state."""
        said = [speaker.begin(tokens, mask) for speaker in self.speakers]
        return self._told(said, torch.arange(len(tokens)))

    def step(self, state: Standing, tokens: Tensor) -> tuple[Tensor, Standing]:
        """Return the same after one more token, (b,), of each."""
        pairs = zip(self.speakers, state.states, strict=True)
        return self._told([speaker.step(its, tokens) for speaker, its in pairs], state.rows)

    def keep(self, state: Standing, rows: Tensor) -> Standing:
        """Return the state of some of its rows, (m,) indices."""
        pairs = zip(self.speakers, state.states, strict=True)
        return Standing([s.keep(its, rows) for s, its in pairs], state.rows[rows.cpu()])

    def _told(self, said: Sequence[tuple[Tensor, Any]], rows: Tensor) -> tuple[Tensor, Standing]:
        fused, factors = self._fused([logits for logits, _ in said])
        if self.heard is not None:
            self.heard(rows, factors)
        return fused, Standing([state for _, state in said], rows)

    def _fused(self, said: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (n, vocabulary) float32 log-probabilities and (n, experts) factors."""
        return fused(said, self.rule, has_small=self.has_small)


@torch.no_grad()
def fused(said: Sequence[Tensor], rule: Rule, *, has_small: bool) -> tuple[Tensor, Tensor]:
    """Return (n, vocabulary) float32 log-probabilities of what models said, and the factors.

    `said` is the base's logits, the small model's where there is one, and each expert's.
    """
    device, width = said[0].device, min(logits.shape[-1] for logits in said)
    base, *rest = (logits[..., :width].to(device) for logits in said)
    small, tuned = (rest[0], rest[1:]) if has_small else (base, rest)
    factors = rule.factors(base, small, tuned)
    return moved(base, small, tuned, factors).float(), factors
