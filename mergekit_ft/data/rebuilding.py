"""Rows rebuilt so that a model learns from its own words where they are right (S3FT).

Selective self-to-supervised fine-tuning (Gupta et al. 2025, arXiv:2502.08130). Of each row (x, y),
with the model as it is:

    y^ = answer to x                    if a judge finds it right: (x, y^)
    y~ = y in the model's own words     else, if that is right: (x, y~)
    y                                   else
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ft.data.judges import Judge
from mergekit_ft.data.rows import Encoder, Row, read_rows
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.models.decoding import Stop, answers
from mergekit_ft.models.speaker import Speaker
from mergekit_ft.options import Progress, Unwatched

SHAPE = {"completion": ("prompt", "completion")}
SOURCES = ("own", "paraphrase", "gold")
PARAPHRASE = (
    "{prompt}\n\nA right answer is:\n{completion}\n\nWrite this answer again in your own words. "
    "Keep its meaning and its result, and write nothing else.\n"
)


@dataclass(frozen=True)
class Rebuilt:
    """Rows, and where each answer came from."""

    lines: list[str]
    sources: list[str]  # of SOURCES
    tried: list[dict[str, Any]] = field(default_factory=list)  # row by row, what the model said

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        counts = Counter(self.sources)
        return {
            "rows": len(self.lines),
            **{source: counts[source] for source in SOURCES},
            **{f"{source}_share": counts[source] / len(self.lines) for source in SOURCES},
        }


def rebuild(
    speaker: Speaker,
    files: Sequence[str | os.PathLike[str]],
    judge: Judge,
    *,
    paraphrase: str | None = PARAPHRASE,
    rows: str = "auto",
    stop: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch: int = 16,
    progress: Progress | None = None,
) -> Rebuilt:
    """Return the rows of JSONL files with answers in the model's own words, where those are right.

    `paraphrase` is the prompt that asks for a row's answer again, of {prompt} and {completion};
    None does not ask. An answer that was cut at `max_new_tokens` is not right. SourceError where a
    judge fails.
    """
    _require_words(paraphrase)
    found = read_rows(files, SHAPE)
    encoder = Encoder(speaker.tokenizer, rows, 1 << 30)
    stopped = Stop(tuple(stop), max_new_tokens)
    said: dict[int, str] = {}
    tried: list[dict[str, Any]] = [{"row": row.where} for row in found]
    sources = ["gold"] * len(found)

    watcher = progress or Unwatched()

    def ask(source: str, asked: dict[int, str]) -> None:
        watcher.start(len(asked), f"{source} answers")
        order, prompts = list(asked), [encoder.prompt(text) for text in asked.values()]
        _require_room(speaker, [found[i] for i in order], prompts, stopped)
        for at, answer in answers(speaker, prompts, stopped, batch=batch):
            i = order[at]
            text = answer.text.strip()
            right = answer.ended != "length" and bool(text) and judge(text, found[i])
            tried[i][source] = {"answer": text, "ended": answer.ended, "right": right}
            if right:
                said[i], sources[i] = _joined(found[i], text), source
            watcher.advance(1)

    try:
        ask("own", {i: row.words["prompt"] for i, row in enumerate(found)})
        rest = [i for i in range(len(found)) if i not in said]
        if paraphrase is not None and rest:
            ask("paraphrase", {i: _filled(paraphrase, found[i]) for i in rest})
    finally:
        watcher.close()
    lines = [_line(row, said.get(i)) for i, row in enumerate(found)]
    return Rebuilt(lines, sources, tried)


def _require_words(paraphrase: str | None) -> None:
    for word in ("{prompt}", "{completion}"):
        if paraphrase is not None and word not in paraphrase:
            raise PlanError(f"paraphrase: has no {word}, so the model would not know what to say")


def _filled(paraphrase: str, row: Row) -> str:
    """Return the prompt of a paraphrase; braces of the row's own stay as they are."""
    before, _, after = paraphrase.partition("{completion}")
    words = row.words
    return str(
        before.replace("{prompt}", words["prompt"])
        + words["completion"]
        + after.replace("{prompt}", words["prompt"])
    )


def _require_room(
    speaker: Speaker, rows: Sequence[Row], prompts: Sequence[Sequence[int]], stop: Stop
) -> None:
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise SourceError(
                f"{row.where}: its prompt has no token to go on from; write some text"
            )
        if speaker.most is not None and len(prompt) + stop.most > speaker.most:
            raise SourceError(
                f"{row.where}: a prompt of {len(prompt)} tokens and an answer of {stop.most} do "
                f"not fit into the model's {speaker.most}; lower max_new_tokens, or leave it out"
            )


def _joined(row: Row, text: str) -> str:
    """Return an answer that stands off its prompt as the row's own does."""
    gold = str(row.words["completion"])
    return gold[: len(gold) - len(gold.lstrip())] + text


def _line(row: Row, answer: str | None) -> str:
    words = dict(row.words) if answer is None else {**row.words, "completion": answer}
    return json.dumps(words, ensure_ascii=False)
