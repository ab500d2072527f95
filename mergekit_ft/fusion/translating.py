"""Tokens that models number otherwise, and prompts that one model sees longer than others do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.models.decoding import padded
from mergekit_ft.models.speaker import Speaker
from mergekit_ft.registry import did_you_mean

TOLD = 3  # tokens that an error names


class Translated:
    """A `Speaker` asked in, and answering in, the numbers that another model's tokens have.

    `ids` (vocabulary,) is by the other's numbers this one's; -1 where no token has the number.
    """

    def __init__(self, speaker: Speaker, ids: Tensor, tokenizer: Any) -> None:
        self.speaker, self.ids, self.tokenizer = speaker, ids, tokenizer
        self.most = speaker.most
        back = {own: other for other, own in enumerate(ids.tolist()) if own >= 0}
        self.ends = frozenset(back[own] for own in speaker.ends if own in back)

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Return (b, n, vocabulary) float32 logits of next tokens; `at` places (m, vocabulary)."""
        return self._back(self.speaker.read(self._own(tokens), mask, at))

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Return (b, vocabulary) float32 logits of the token after the prompts, and a state."""
        logits, state = self.speaker.begin(self._own(tokens), mask)
        return self._back(logits), state

    def step(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the same after one more token, (b,), of each."""
        logits, state = self.speaker.step(state, self._own(tokens))
        return self._back(logits), state

    def keep(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some of its rows, (m,) indices."""
        return self.speaker.keep(state, rows)

    def _own(self, tokens: Tensor) -> Tensor:
        own = self.ids.to(tokens.device)[tokens]
        return own.clamp_(min=0)  # padding, which is masked

    def _back(self, logits: Tensor) -> Tensor:
        ids = self.ids.to(logits.device)
        return logits[..., ids.clamp(min=0)].masked_fill(ids < 0, -torch.inf)


def translation(
    role: str,
    words: Mapping[str, int],
    other: Mapping[str, int],
    renamed: Mapping[str, str] | None = None,
) -> Tensor | None:
    """Return by each number of `words` that of the same token in `other`; None: they are the same.

    `renamed` says of tokens of `words` what `other` calls them. SourceError where tokens have no
    counterpart: what they are in text would be read, or said, by one model alone.
    """
    renamed = renamed or {}
    for token, name in renamed.items():
        if token not in words:
            hint = did_you_mean(token, list(words))
            raise SourceError(f"tokens: {token!r} is no token of base{hint}")
        if name not in other:
            raise SourceError(f"tokens: {name!r} is no token of {role}; see its tokenizer.json")
    lost = [token for token in words if renamed.get(token, token) not in other]
    if lost:
        named = ", ".join(map(repr, sorted(lost)[:TOLD]))
        raise SourceError(
            f"{role}: {len(lost)} of {len(words)} tokens of base are none of its tokens, such as "
            f"{named}; logits are fused token by token. Take small models of the base's tokens, or "
            "say under `tokens:` what it calls them"
        )
    if not renamed and words == other:
        return None
    ids = torch.full((max(words.values()) + 1,), -1, dtype=torch.long)
    for token, number in words.items():
        ids[number] = other[renamed.get(token, token)]
    if len(set(ids[ids >= 0].tolist())) < len(words):
        raise SourceError(
            f"tokens: two tokens of base would be one of {role}; name each by its own"
        )
    return ids


class Shown:
    """A `Speaker` that sees longer prompts than those it is begun with: shots before each."""

    def __init__(
        self, speaker: Speaker, prompts: Mapping[tuple[int, ...], Sequence[int]], pad: int = 0
    ) -> None:
        self.speaker, self.prompts, self.pad = speaker, prompts, pad
        self.tokenizer, self.ends = speaker.tokenizer, speaker.ends
        longer = max(len(long) - len(short) for short, long in prompts.items())
        self.most = None if speaker.most is None else speaker.most - longer

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Raise: shots stand before prompts, and these are whole texts."""
        raise OperatorError("shots are put before prompts; they have none in texts that are read")

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Return (b, vocabulary) float32 logits of the token after the prompts, and a state."""
        pairs = zip(tokens, mask.bool(), strict=True)
        rows = [self.prompts[tuple(row[there].tolist())] for row, there in pairs]
        return self.speaker.begin(*padded(rows, self.pad, left=True))

    def step(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the same after one more token, (b,), of each."""
        return self.speaker.step(state, tokens)

    def keep(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some of its rows, (m,) indices."""
        return self.speaker.keep(state, rows)
