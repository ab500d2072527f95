"""Tokens that a plan tells apart: where their rows come from, and whether that has an effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.plan import Reading
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.tokenizers import ModelToken, TokenizerWords, TokenWords, Zero
from mergekit_ft.registry import did_you_mean
from mergekit_ft.sources import Source
from mergekit_ft.tokens.alignment import Choice
from mergekit_ft.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Model:
    """A model, its vocabulary and the rows it has."""

    source: Source
    vocabulary: Vocabulary
    rows: int

    def row(self, token: str) -> int | None:
        """Return the row of a token, None where it has none."""
        number = self.vocabulary.ids.get(token)
        return number if number is not None and number < self.rows else None


class Choices:
    """Reads `tokens:`; what cannot be done is a fault."""

    def __init__(
        self, reading: Reading, models: Mapping[Any, Model], words: TokenizerWords
    ) -> None:
        self.reading, self.models, self.words = reading, models, words
        self.order = list(models)

    def read(self, before: Mapping[str, int]) -> dict[str, Choice | None]:
        """Return the choice for each token; `before` are the tokens without these."""
        found = {}
        for token, said in self.words.tokens.items():
            path: Keys = ("tokenizer", "tokens", token)
            holders = [model for model in self.models.values() if model.row(token) is not None]
            if said.source is None and not holders:
                self._unknown(path, token)
                continue
            if token in before and self._idle(said, holders):
                self._without_effect(path, token, said)
                continue
            found[token] = self._choice(path, token, said)
        return found

    def _idle(self, said: TokenWords, holders: Sequence[Model]) -> bool:
        """Say whether every model keeps what it has, or does what it would do anyway."""
        return not said.force and (said.source is None or len(holders) == len(self.models))

    def _unknown(self, path: Keys, token: str) -> None:
        known = [other for model in self.models.values() for other in model.vocabulary.ids]
        hint = did_you_mean(token, known)
        new = "a new one says where its row comes from: `source: {kind: zero}`, or a model's token"
        self.reading.add(path, f"no model has the token {token!r} ({new}){hint}", key=True)

    def _without_effect(self, path: Keys, token: str, said: TokenWords) -> None:
        why = (
            "every model has it, and keeps its own row" if said.source else "nothing is said of it"
        )
        message = f"{token!r} has no effect: {why}; write `force: true`, or remove it"
        self.reading.add(path, message, key=True)

    def _choice(self, path: Keys, token: str, said: TokenWords) -> Choice | None:
        path = (*path, "source")
        if said.source is None:
            return None
        if isinstance(said.source, Zero):
            return Choice()
        of_token = isinstance(said.source, ModelToken)
        reference = said.source.model if of_token else said.source
        if reference.key not in self.models:
            names = [model.source.reference for model in self.models.values()]
            hint = did_you_mean(str(reference), names)
            message = f"{reference} is none of the models that are merged{hint}"
            self.reading.add((*path, "model") if of_token else path, message)
            return None
        model = self.models[reference.key]
        row = self._row(path, model, said.source if of_token else ModelToken(model="", token=token))
        return None if row is None else Choice(self.order.index(reference.key), row)

    def _row(self, path: Keys, model: Model, wanted: ModelToken) -> int | None:
        if wanted.token is None:
            assert wanted.token_id is not None
            if wanted.token_id < model.rows:
                return wanted.token_id
            message = (
                f"{model.source.reference} has {model.rows} rows, none of id {wanted.token_id}"
            )
            self.reading.add((*path, "token_id"), message)
            return None
        row = model.row(wanted.token)
        if row is None:
            hint = did_you_mean(wanted.token, model.vocabulary.ids)
            message = f"{model.source.reference} has no row for the token {wanted.token!r}{hint}"
            self.reading.add((*path, "token") if wanted.model else path, message)
        return row
