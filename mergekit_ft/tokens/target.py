"""The vocabulary of the output: whose it is, and what joins it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ft.tokens.vocabulary import ADDED, Vocabulary

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """The tokens of the output: those of one vocabulary, then those that join it."""

    core: Vocabulary
    ordinary: Mapping[str, int] = field(default_factory=dict)  # that join, with their new ids
    added: Mapping[str, Json] = field(default_factory=dict)  # added tokens that join

    @property
    def ids(self) -> dict[str, int]:
        """Return the id of every token."""
        return {
            **self.core.ids,
            **self.ordinary,
            **{token: said["id"] for token, said in self.added.items()},
        }

    @property
    def new(self) -> list[str]:
        """Return the tokens that join, in order of id."""
        return [*self.ordinary, *self.added]


def union(core: Vocabulary, others: Sequence[tuple[Vocabulary, int]]) -> Target:
    """Return a vocabulary and what others have besides, of each the tokens that have a row.

    Ids count up from the vocabulary's last: the models in order, first the ordinary tokens of all,
    then the added ones, each in order of id. This holds for every run.
    """
    ordinary: dict[str, None] = {}
    added: dict[str, Json] = {}
    for vocabulary, rows in others:
        for token in _by_id(vocabulary.ordinary, rows):
            if token not in core.ids and token not in vocabulary.added:
                ordinary[token] = None
    for vocabulary, rows in others:
        for token, said in vocabulary.added.items():
            if said["id"] < rows and token not in core.ids and token not in ordinary:
                added.setdefault(token, said)
    return _numbered(core, ordinary, added)


def extended(target: Target, tokens: Iterable[str], known: Sequence[Vocabulary]) -> Target:
    """Return a target with tokens that a plan names; one that no model has is an added token."""
    have, ordinary, added = target.ids, dict.fromkeys(target.ordinary), dict(target.added)
    for token in tokens:
        if token in have:
            continue
        holders = [vocabulary for vocabulary in known if token in vocabulary.ids]
        said = next((v.added[token] for v in holders if token in v.added), None)
        if holders and said is None:
            ordinary[token] = None
        else:
            added[token] = said or {"content": token, **ADDED}
    return _numbered(target.core, ordinary, added)


def _by_id(ids: Mapping[str, int], rows: int) -> list[str]:
    return sorted((token for token, number in ids.items() if number < rows), key=ids.__getitem__)


def _numbered(core: Vocabulary, ordinary: Iterable[str], added: Mapping[str, Json]) -> Target:
    numbers = {token: core.size + i for i, token in enumerate(ordinary)}
    first = core.size + len(numbers)
    defined = {token: {**said, "id": first + i} for i, (token, said) in enumerate(added.items())}
    return Target(core, numbers, defined)
