"""Exact match: the greedy answer to each prompt beside the one that the row has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.data.matching import normalised
from mergekit_ft.data.rows import UNSCORED, Row, Sample
from mergekit_ft.errors import SourceError
from mergekit_ft.evaluation.scoring import Watch
from mergekit_ft.models.decoding import Answer, Stop, answers
from mergekit_ft.models.speaker import Speaker

LEAST = 32  # tokens that an answer may have where nothing else is asked


@dataclass(frozen=True)
class Answered:
    """An answer and its verdict."""

    row: Row
    answer: Answer
    exact: bool
    normalised: bool

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "row": self.row.where,
            "prompt": asked(self.row),
            "answer": self.answer.text,
            "ended": self.answer.ended,
            "expected": expected(self.row),
            "exact_match": self.exact,
            "exact_match_normalised": self.normalised,
        }


def expected(row: Row) -> str:
    """Return the answer that a row has: its completion, or what the assistant says last."""
    if row.shape == "completion":
        return str(row.words["completion"])
    return str(row.words["messages"][_last(row)]["content"])


def asked(row: Row) -> Any:
    """Return what comes before that answer: a text, or messages."""
    if row.shape == "completion":
        return row.words["prompt"]
    return row.words["messages"][: _last(row)]


def _last(row: Row) -> int:
    roles = [message["role"] for message in row.words["messages"]]
    return len(roles) - 1 - roles[::-1].index("assistant")


def most_tokens(samples: Sequence[Sample], wanted: int | None, rows: Sequence[Row]) -> int:
    """Return how many tokens an answer may have: as wanted, or as many as the longest needs."""
    lengths = [len(sample.tokens) - _start(sample) for sample in samples]
    if wanted is None:
        return max(LEAST, *lengths)
    for row, length in zip(rows, lengths, strict=True):
        if length > wanted:
            raise SourceError(
                f"{row.where}: its answer has {length} tokens with the one that ends it, more than "
                f"max_new_tokens {wanted} lets a model say, so it could never match; raise it"
            )
    return wanted


def answered(
    speaker: Speaker,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    stop: Stop,
    batch: int,
    watch: Watch = lambda rows: None,
) -> list[Answered]:
    """Return the greedy answer to each row's prompt, and whether it is the row's own."""
    prompts = [sample.tokens[: _start(sample)] for sample in samples]
    for row, prompt in zip(rows, prompts, strict=True):
        _require_room(speaker, row, len(prompt), stop)
    found: dict[int, Answered] = {}
    for i, answer in answers(speaker, prompts, stop, batch=batch):
        found[i] = _verdict(rows[i], answer)
        watch(1)
    return [found[i] for i in range(len(rows))]


def _start(sample: Sample) -> int:
    """Return where the last answer of a sample begins."""
    start = len(sample.labels)
    while start and sample.labels[start - 1] != UNSCORED:
        start -= 1
    return start


def _require_room(speaker: Speaker, row: Row, length: int, stop: Stop) -> None:
    if not length:
        raise SourceError(f"{row.where}: its prompt has no token to go on from; write some text")
    if speaker.most is not None and length + stop.most > speaker.most:
        raise SourceError(
            f"{row.where}: its prompt of {length} tokens and an answer of {stop.most} do not fit "
            f"into the model's {speaker.most}; leave the row out, or lower max_new_tokens"
        )


def _verdict(row: Row, answer: Answer) -> Answered:
    true = expected(row)
    return Answered(
        row,
        answer,
        exact=answer.text.strip() == true.strip(),
        normalised=normalised(answer.text) == normalised(true),
    )
