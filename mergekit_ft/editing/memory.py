"""A model in memory as the memories that editors write into: keys, values, what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_ft.editing.encoding import Encoder, Tokens
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.matrices import Matrix
from mergekit_ft.editing.subjects import last_token
from mergekit_ft.editing.targets import Search, Text
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.models.decoding import padded
from mergekit_ft.models.layered import Layered, Look, Texts
from mergekit_ft.recalling import Descent, Part

ROWS = 64  # texts of a batch
BATCH = 8  # windows
SIDE = 8  # edits whose values are found beside each other

KL_TEXT = "{} is a"


@dataclass(frozen=True)
class Fact:
    """An edit as the solvers see it."""

    texts: tuple[tuple[Tokens, int], ...]  # the prompt alone, then in each context: tokens and t*
    essence: tuple[Tokens, int]  # what the subject is said to be must not change
    target: Tokens


def fact(encoder: Encoder, edit: Edit, contexts: Iterable[str]) -> Fact:
    """Return an edit in its contexts; SourceError, with its line, where it cannot be written."""
    try:
        if edit.subject is None:
            raise SourceError("has no subject, whose last token is where a fact is written")
        if edit.weight != 1:
            raise SourceError("weight has no effect where edits are solved for; leave it out")
        texts = [last_token(encoder, before + edit.prompt, edit.subject) for before in contexts]
        essence = last_token(encoder, KL_TEXT.format(edit.subject), edit.subject)
    except SourceError as error:
        raise SourceError(f"{edit.where}: {error}") from error
    return Fact(tuple(texts), essence, encoder.edit(edit).target)


@dataclass
class ModelMemory:
    """A model whose matrices are read, and written, as memories."""

    layered: Layered
    matrices: Mapping[int, Matrix]  # of the layers that are written
    facts: Sequence[Fact]
    seconds: Mapping[int, Tensor]  # E[k k^T] of the layers that are written
    say: Callable[[str], None]
    pad: int = 0
    losses: list[float] = field(default_factory=list)  # of the values that were found

    @property
    def count(self) -> int:
        """Return how many edits there are."""
        return len(self.facts)

    @property
    def layers(self) -> int:
        """Return how many layers the model has."""
        return len(self.layered.layers)

    def some(self, start: int, stop: int) -> ModelMemory:
        """Return the same model with some of the edits."""
        return replace(self, facts=self.facts[start:stop])

    def wanted(self, layer: int, part: Part, how: Descent) -> Tensor:
        """Return (h, n) values with which the model as it is would say the targets."""
        moves = []
        for start in range(0, self.count, SIDE):
            few = self.facts[start : start + SIDE]
            sizes = self.some(start, start + SIDE).values(layer, part).norm(dim=0)
            found = self._search(few, layer, sizes, how).run()
            self.losses += found.losses
            moves.append(found.delta)
            self.say(f"values: {min(start + SIDE, self.count)} of {self.count} edits")
        return self.values(layer, part) + torch.cat(moves).T.double().cpu()

    def values(self, layer: int, part: Part) -> Tensor:
        """Return (h, n) values that the model as it is has in the prompts alone."""
        module = self.layered.layers[layer] if part == "layer" else self.matrices[layer].module
        texts = [fact.texts[0] for fact in self.facts]
        return self._seen(texts, Look(module, out=True)).T

    def keys(self, layer: int, alone: float) -> Tensor:
        """Return (d_in, n) keys: `alone` of the prompt alone, the rest the mean over contexts."""
        texts = [text for fact in self.facts for text in fact.texts]
        seen = self._seen(texts, Look(self.matrices[layer].module))
        each = seen.view(self.count, -1, seen.shape[1])
        if each.shape[1] == 1:
            return each[:, 0].T
        return (alone * each[:, 0] + (1 - alone) * each[:, 1:].mean(dim=1)).T

    def answers(self, layer: int, keys: Tensor) -> Tensor:
        """Return (h, n) what the matrix answers to (d_in, n) keys."""
        return self.matrices[layer].answers(keys)

    def second(self, layer: int) -> Tensor:
        """Return (d_in, d_in) float64 E[k k^T] over text, in the model before any edit."""
        return self.seconds[layer]

    def write(self, layer: int, update: Tensor) -> None:
        """Add (h, d_in) to a layer's matrix."""
        if not bool(update.isfinite().all()):
            raise OperatorError(f"layer {layer}: the update is not of numbers")
        self.matrices[layer].add(update)

    def _search(self, few: Sequence[Fact], layer: int, sizes: Tensor, how: Descent) -> Search:
        """Return the descent of a few edits side by side.

        What stands before t* is the same whatever the value there, so it is read once.
        """
        rows: list[tuple[Tokens, int]] = []
        texts: list[Text] = []
        for number, fact in enumerate(few):
            for tokens, at in fact.texts:
                first = len(tokens) - 1 - at  # where the target's first token is asked for
                scored = [(first + i, token) for i, token in enumerate(fact.target)]
                rows.append((tokens + fact.target[:-1], at))
                texts.append(Text(number, 0, tuple(scored)))
            rows.append(fact.essence)
            texts.append(Text(number, 0))
        begun = self._begun(rows)
        (leaving,) = self.layered.look(begun, [Look(self.layered.layers[layer], out=True)])

        def above(moved: Tensor, row: Tensor, place: Tensor) -> Tensor:
            return self.layered.above(begun, layer, moved, row, place)

        return Search(above, leaving, texts, sizes.to(leaving.device), how)

    def _begun(self, rows: Sequence[tuple[Tokens, int]]) -> Texts:
        """Return texts with what stands before t* read, so that t* is the first column."""
        before, masked = padded([row[:at] for row, at in rows], self.pad, left=True)
        after, mask = padded([row[at:] for row, at in rows], self.pad, left=False)
        tokens = torch.cat([before, after], dim=1).to(self.layered.device)
        mask = torch.cat([masked, mask], dim=1).to(self.layered.device)
        if not before.shape[1]:
            return Texts(tokens, mask)
        return self.layered.begin(tokens, mask, before.shape[1])

    def _seen(self, texts: Sequence[tuple[Tokens, int]], look: Look) -> Tensor:
        """Return (texts, width) float64 host, what is seen at each text's t*."""
        found = []
        for start in range(0, len(texts), ROWS):
            some = texts[start : start + ROWS]
            tokens, mask = padded([row[: at + 1] for row, at in some], self.pad, left=False)
            device = self.layered.device
            (seen,) = self.layered.look(Texts(tokens.to(device), mask.to(device)), [look])
            places = torch.tensor([at for _, at in some], device=seen.device)
            found.append(seen[torch.arange(len(some), device=seen.device), places].double().cpu())
        return torch.cat(found)


def keys_of(
    layered: Layered, matrices: Mapping[int, Matrix], pad: int
) -> Callable[[Sequence[Tokens], Sequence[int]], Iterator[tuple[int, Tensor]]]:
    """Return what gives the keys of all tokens of some windows, the shortest window first."""

    def keys(windows: Sequence[Tokens], layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        looks = [Look(matrices[layer].module) for layer in layers]
        even = sorted(windows, key=len)  # so that little of a batch is padding
        for start in range(0, len(even), BATCH):
            some = even[start : start + BATCH]
            tokens, mask = padded(some, pad, left=False)
            texts = Texts(tokens.to(layered.device), mask.to(layered.device))
            seen = layered.look(texts, looks)
            for layer, rows in zip(layers, seen, strict=True):
                for window, row in zip(some, rows, strict=True):
                    yield layer, row[: len(window)]

    return keys
