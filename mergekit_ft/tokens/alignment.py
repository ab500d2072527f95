"""Which row of which model each row of the output comes from: pure data, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
ZEROS, MEAN, FILLER = -1, -2, -3  # what a row may be that is no model's own
NONE = -1  # no row


@dataclass(frozen=True)
class Choice:
    """Where a token's row comes from in models that lack it; in all of them if forced."""

    model: int = ZEROS  # position of a model, or ZEROS
    row: int = 0


@dataclass(frozen=True)
class Holder:
    """A model as alignment sees it: its tokens and its rows."""

    ids: Mapping[str, int]
    rows: int


@dataclass(frozen=True)
class Part:
    """Where the rows of one model come from once they are aligned."""

    which: Rows  # (rows,) position of a model, or ZEROS, MEAN, FILLER
    old: Rows  # (rows,) the row of that model
    counts: Mapping[str, int]  # kept, moved, added, padded, dropped

    @property
    def exact(self) -> bool:
        """Say whether every row is zero or another row as it is."""
        return bool((self.which >= ZEROS).all())

    def identical(self, me: int, rows: int) -> bool:
        """Say whether nothing changes for a model of so many rows."""
        whole = len(self.which) == rows and bool((self.which == me).all())
        return whole and bool((self.old == np.arange(rows)).all())


@dataclass(frozen=True)
class Alignment:
    """Every model's rows in the order of the output's vocabulary."""

    parts: tuple[Part, ...]
    means: Mapping[int, tuple[tuple[int, int], ...]]  # row -> (model, row) of those it averages
    tokens: Rows  # the rows that tokens have, in order
    orphans: tuple[int, ...]  # rows of tokens that no model has, which no choice is made for


def align(
    target: Mapping[str, int],
    rows: int,
    holders: Sequence[Holder],
    base: int | None,
    choices: Mapping[str, Choice | None],
    forced: Iterable[str],
) -> Alignment:
    """Align models by token; a token that a model lacks takes the row that is chosen for it.

    Without a choice that is the row of the only model that has the token, else the base's, else
    the mean of those that have it. Rows without a token keep what lies there.
    """
    held = np.stack([_held(target, rows, holder) for holder in holders])  # (k, rows)
    tokens = np.zeros(rows, dtype=bool)
    tokens[list(target.values())] = True
    forced_rows = np.zeros(rows, dtype=bool)
    forced_rows[[target[token] for token in forced]] = True
    own = np.where(forced_rows, NONE, held)
    default = _Default(held, base, {target[t]: c for t, c in choices.items() if c is not None})
    default.decide((own == NONE).any(axis=0), tokens)
    parts = []
    for me, holder in enumerate(holders):
        mine = own[me] != NONE
        which = np.where(mine, me, default.which)
        old = np.where(mine, own[me], default.old)
        parts.append(Part(which, old, _counts(own[me], tokens, holder)))
    return Alignment(tuple(parts), default.means, np.flatnonzero(tokens), tuple(default.orphans))


def _held(target: Mapping[str, int], rows: int, holder: Holder) -> Rows:
    """Return the row that a model has for each row of the output, NONE where it has none."""
    held = np.full(rows, NONE, dtype=np.int64)
    taken = np.zeros(rows, dtype=bool)  # of the output, by a token
    unused = np.ones(holder.rows, dtype=bool)  # of the model, by none of its tokens
    for number in holder.ids.values():
        if number < holder.rows:
            unused[number] = False
    for token, number in target.items():
        taken[number] = True
        old = holder.ids.get(token)
        if old is not None and old < holder.rows:
            held[number] = old
    n = min(rows, holder.rows)
    padding = np.flatnonzero(~taken[:n] & unused[:n])
    held[padding] = padding
    return held


class _Default:
    """Decides, once for all models, which row one takes that has none of its own."""

    def __init__(self, held: Rows, base: int | None, chosen: Mapping[int, Choice]) -> None:
        self.held, self.base, self.chosen = held, base, chosen
        self.which = np.full(held.shape[1], ZEROS, dtype=np.int64)
        self.old = np.zeros(held.shape[1], dtype=np.int64)
        self.means: dict[int, tuple[tuple[int, int], ...]] = {}
        self.orphans: list[int] = []

    def decide(self, lacking: Mask, tokens: Mask) -> None:
        """Decide for every row of the output that some model has none for."""
        has = self.held != NONE
        number, lacking = has.sum(axis=0), lacking.copy()
        for row, choice in self.chosen.items():
            self._take(row, choice.model, choice.row)
            lacking[row] = False
        places = np.arange(len(number))
        sources = [(has.argmax(axis=0), number == 1)]
        if self.base is not None:
            sources.append((np.full(len(number), self.base), has[self.base]))
        for model, fits in sources:
            rows = places[lacking & fits]
            self.which[rows], self.old[rows] = model[rows], self.held[model[rows], rows]
            lacking[rows] = False
        for row in places[lacking].tolist():
            self._blend(row, is_token=bool(tokens[row]))

    def _blend(self, row: int, *, is_token: bool) -> None:
        """Decide for a row that several models have, or none."""
        holders = np.flatnonzero(self.held[:, row] != NONE).tolist()
        if holders:
            self.means[row] = tuple((model, int(self.held[model, row])) for model in holders)
        if holders or not is_token:
            self._take(row, MEAN if holders else FILLER, 0)
        else:
            self.orphans.append(row)

    def _take(self, row: int, model: int, old: int) -> None:
        self.which[row], self.old[row] = model, old


def _counts(own: Rows, tokens: Mask, holder: Holder) -> dict[str, int]:
    """Return how many rows are kept, moved, added, padded; and how many of the model's dropped."""
    places = np.arange(len(own))
    has = own != NONE
    kept = has & (own == places)
    return {
        "kept": int(kept.sum()),
        "moved": int((has & ~kept).sum()),
        "added": int((~has & tokens).sum()),
        "padded": int((~has & ~tokens).sum()),
        "dropped": holder.rows - len(np.unique(own[has])),
    }
