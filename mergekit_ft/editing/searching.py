"""Which layer to tune: several depths tried on a few edits, the better half of them longer."""

from __future__ import annotations

import random  # noqa: TID251  # one of its own, seeded: which edits are tried
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.data.neutral import neutral_rows
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.places import chosen
from mergekit_ft.editing.suffix import Climbed, Suffix, Text
from mergekit_ft.errors import PlanError
from mergekit_ft.models.streaming import Streamed
from mergekit_ft.teaching import Graded, Teacher

CANDIDATES = 6
TRIED = 48  # edits, at most
SHARES = (0.25, 0.5)  # of the epochs, round by round
DRIFT = 0.2  # nats that the next word after neutral text may move by, KL(before || after)
ANCHORS, LENGTH = 24, 24  # neutral texts, and tokens of each


@dataclass
class _Lesson:
    """A suffix whose first texts are taught; what comes after is asked, and held out."""

    suffix: Suffix
    taught: int
    anchors = 0

    @property
    def count(self) -> int:
        return self.taught

    @property
    def masters(self) -> Sequence[nn.Parameter]:
        return self.suffix.masters

    def grade(self, rows: Sequence[int]) -> Graded:
        return self.suffix.grade(rows)

    def drift(self, rows: Sequence[int]) -> Tensor:
        return self.suffix.drift(rows)

    def say(self, line: str) -> None:
        """Say nothing: the table tells."""


def searched(
    editor: Teacher,
    streamed: Streamed,
    encoder: Encoder,
    edits: Sequence[Edit],
    seed: int,
    budget: int,
    say: Callable[[str], None],
) -> tuple[int, str, list[dict[str, Any]]]:
    """Return the layer whose edits carry over to rephrases best, a line on it, and the table.

    Candidates are evenly spread over the depth. All are taught some edits for a quarter of the
    epochs, the better half for a half, each time from the weights as they were; they are asked
    about rephrases that none was taught. One that moves neutral text by more than DRIFT is behind
    all that do not.
    """
    some = _some(edits, seed)
    texts = [_text(encoder, edit, edit.prompt) for edit in some]
    asked = [_text(encoder, edit, prompt) for edit in some for prompt in edit.rephrase]
    layers = _spread(len(streamed.layers))
    say(f"layers {', '.join(map(str, layers))} are tried on {len(some)} edits")
    known = _suffixes(editor, streamed, layers, [*texts, *asked], _anchors(encoder), budget)
    table: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, share in enumerate(SHARES):
        tried = editor.shortened(share, len(texts))
        for layer in layers:
            row = {"layer": layer, "round": number + 1}
            table.append(row | _tried(tried, known[layer], len(texts), len(asked), seed))
            say(_told(table[-1]))
        rows = sorted(table[-len(layers) :], key=_rank)
        layers = sorted(row["layer"] for row in rows[: max(1, len(rows) // 2)])
    best = rows[0]
    told = f"layer {best['layer']} is chosen, with {best['generalization']:.0%} of the rephrases"
    if best["drift"] > DRIFT:
        told += f"; every layer moved neutral text by more than {DRIFT} nats"
    return best["layer"], told, table


def _some(edits: Sequence[Edit], seed: int) -> list[Edit]:
    able = [edit for edit in edits if edit.rephrase]
    if not able:
        raise PlanError(
            "layer: search asks rephrases that were not taught, of which the edits have none; give "
            "some, or a layer"
        )
    return random.Random(seed).sample(able, min(TRIED, len(able)))


def _spread(count: int) -> list[int]:
    """Return layers at even distances, the first and the last ones apart."""
    shares = ((i + 1) / (CANDIDATES + 0.5) for i in range(CANDIDATES))
    return sorted({min(count - 1, round(share * count)) for share in shares})


def _text(encoder: Encoder, edit: Edit, prompt: str) -> Text:
    encoded = encoder.answered(prompt, edit.target, edit.where)
    return Text(encoded.prompt + encoded.target, len(encoded.prompt), edit.weight)


def _anchors(encoder: Encoder) -> list[tuple[int, ...]]:
    rows = neutral_rows()[:ANCHORS]
    return [tuple(encoder.tokenizer(row.words["text"])["input_ids"][:LENGTH]) for row in rows]


def _suffixes(
    editor: Teacher,
    streamed: Streamed,
    layers: Sequence[int],
    texts: Sequence[Text],
    anchors: Sequence[tuple[int, ...]],
    budget: int,
) -> dict[int, Suffix]:
    """Return the suffix of each candidate: the texts are read once, up to the highest."""
    climbed, known = Climbed(), {}
    share = budget // (len(layers) + 1)
    with torch.no_grad():
        for layer in layers:
            tuned = chosen(streamed.hollow, layer, editor.module, given=True)
            known[layer] = Suffix(streamed, tuned, texts, anchors, budget=share, climbed=climbed)
        streamed.fill_above(min(s.lowest for s in known.values()) - 1)
    return known


def _tried(editor: Teacher, suffix: Suffix, taught: int, asked: int, seed: int) -> dict[str, Any]:
    """Teach a suffix from the weights as they were; return how it fares, and set it back."""
    before = suffix.held()
    editor.teach(_Lesson(suffix, taught), seed)
    rephrased = range(taught, taught + asked)
    with torch.no_grad():
        found = {
            "reliability": sum(suffix.said(range(taught))) / taught,
            "generalization": sum(suffix.said(rephrased)) / asked,
            "loss": float(suffix.grade(rephrased).mean()),
            "drift": float(suffix.drift(range(suffix.anchors))),
        }
    suffix.put(before)
    return found


def _rank(row: dict[str, Any]) -> tuple[bool, float, float]:
    return row["drift"] > DRIFT, -row["generalization"], row["loss"]


def _told(row: dict[str, Any]) -> str:
    return (
        f"round {row['round']}, layer {row['layer']}: {row['reliability']:.0%} of the edits, "
        f"{row['generalization']:.0%} of the rephrases ({row['loss']:.2f} nats), neutral text "
        f"moved by {row['drift']:.3f} nats"
    )
