"""Choice accuracy: which of several answers a model finds likeliest after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.data.rows import UNSCORED, Encoder, Row, Sample
from mergekit_ft.errors import SourceError
from mergekit_ft.evaluation.scoring import Scored, Watch, scored
from mergekit_ft.models.speaker import Speaker


@dataclass(frozen=True)
class Chosen:
    """What a model made of a row's choices."""

    row: Row
    scores: tuple[Scored, ...]  # of each choice

    @property
    def summed(self) -> int:
        """Return the choice of the largest log-probability; of equal ones the first."""
        return min(range(len(self.scores)), key=lambda i: self.scores[i].nats)

    @property
    def per_token(self) -> int:
        """Return the choice of the largest log-probability a token; of equal ones the first."""
        return min(
            range(len(self.scores)), key=lambda i: self.scores[i].nats / self.scores[i].tokens
        )

    @property
    def right(self) -> int:
        """Return the right choice."""
        return choices(self.row)[1]

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        texts = choices(self.row)[0]
        return {
            "row": self.row.where,
            "prompt": self.row.words["prompt"],
            "choices": list(texts),
            "log_probabilities": [-score.nats for score in self.scores],
            "tokens": [score.tokens for score in self.scores],
            "answer": texts[self.summed],
            "answer_per_token": texts[self.per_token],
            "expected": texts[self.right],
            "choice_accuracy": self.summed == self.right,
            "choice_accuracy_per_token": self.per_token == self.right,
        }


def choices(row: Row) -> tuple[tuple[str, ...], int]:
    """Return a row's choices, and which is right; of a pair the one that was preferred."""
    if row.shape == "pair":
        return (row.words["chosen"], row.words["rejected"]), 0
    return tuple(row.words["choices"]), row.words["answer"]


def choose(
    speaker: Speaker,
    rows: Sequence[Row],
    encoder: Encoder,
    batch: int,
    watch: Watch = lambda rows: None,
    name: str = "the model",
) -> list[Chosen]:
    """Return what a model makes of the choices of each row.

    A choice's own tokens are scored, not the one that ends an answer.
    """
    ends = speaker.ends | set(speaker.tokenizer.all_special_ids)
    samples = [
        _unended(sample, ends, row)
        for row in rows
        for sample in encoder.samples([_completion(row, text) for text in choices(row)[0]])
    ]
    _require_fit(speaker, samples, rows, name)
    found = iter(scored(speaker, samples, batch, watch))
    return [Chosen(row, tuple(next(found) for _ in choices(row)[0])) for row in rows]


def _require_fit(
    speaker: Speaker, samples: Sequence[Sample], rows: Sequence[Row], name: str
) -> None:
    left = iter(samples)
    for row in rows:
        longest = max(len(next(left).tokens) for _ in choices(row)[0])
        if speaker.most is not None and longest > speaker.most:
            raise SourceError(
                f"{row.where}: a choice after its prompt has {longest} tokens, which do not fit "
                f"into {name}, which takes {speaker.most}; leave the row out"
            )


def _completion(row: Row, text: str) -> Row:
    words = {"prompt": row.words["prompt"], "completion": text}
    return Row(row.where, "completion", words, row.weight)


def _unended(sample: Sample, ends: set[int] | frozenset[int], row: Row) -> Sample:
    """Return a sample without the tokens that end an answer."""
    end = len(sample.tokens)
    while end and sample.labels[end - 1] in ends:
        end -= 1
    if end < 2 or all(label == UNSCORED for label in sample.labels[1:end]):
        raise SourceError(f"{row.where}: a choice has no tokens of its own, so nothing is scored")
    return Sample(sample.tokens[:end], sample.labels[:end], sample.weight)
