"""Rows of JSONL -> tokens, and which of them are scored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.registry import did_you_mean

SHAPES: dict[str, tuple[str, ...]] = {  # what a row may be: its keys, `weight` apart
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "pair": ("prompt", "chosen", "rejected"),
}
CHOICES = {"choices": ("prompt", "choices", "answer")}  # rows to be asked, not learned from
WEIGHT = "weight"
UNSCORED = -100  # a label that no loss looks at


@dataclass(frozen=True)
class Sample:
    """One row as tokens."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]  # the same, UNSCORED where nothing is learned
    weight: float = 1.0


@dataclass(frozen=True)
class Row:
    """One line of a file."""

    where: str  # file:line
    shape: str  # a key of SHAPES, or of CHOICES
    words: Mapping[str, Any]
    weight: float


def read_rows(
    paths: Sequence[str | os.PathLike[str]],
    shapes: Mapping[str, tuple[str, ...]] = SHAPES,
    numbers: Sequence[str] = (),
) -> list[Row]:
    """Return the rows of JSONL files; all of one shape, every faulty line told at once.

    `numbers` are keys that every row has beside those of its shape, each a finite number.
    """
    faults: list[str] = []
    rows: list[Row] = []
    for path in paths:
        rows += _file(Path(path).expanduser(), shapes, numbers, faults)
    if not rows and not faults:
        faults.append(f"{', '.join(map(str, paths))}: no rows")
    found = {row.shape: row for row in rows}
    if len(found) > 1:
        told = ", ".join(f"{shape} ({row.where})" for shape, row in found.items())
        faults.append(f"rows of different shapes: {told}; keep those of one")
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise SourceError("\n".join(faults[:10]) + more)
    return rows


def _file(
    path: Path,
    shapes: Mapping[str, tuple[str, ...]],
    numbers: Sequence[str],
    faults: list[str],
) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        faults.append(f"{path}: not UTF-8 text (byte {error.start}); data are JSONL files")
        return
    except OSError as error:
        faults.append(f"{path}: cannot be read: {error.strerror or error}")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _row(json.loads(line), shapes, numbers, where)
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON: {error.msg} (column {error.colno})")
        except ValueError as error:
            faults.append(f"{where}: {error}")


def _row(
    words: Any, shapes: Mapping[str, tuple[str, ...]], numbers: Sequence[str], where: str
) -> Row:
    """Return a row; ValueError says what is wrong with it."""
    if not isinstance(words, dict):
        raise ValueError("a row is a JSON object")
    for key in numbers:
        _check_number(key, words.get(key))
    given = words.keys() - {WEIGHT, *numbers}
    shape = next((shape for shape, keys in shapes.items() if given == set(keys)), None)
    if shape is None:
        raise ValueError(_unknown(sorted(given), shapes))
    if shape in CHOICES:
        words = words | {"answer": _choice(words)}
    for key in ("prompt",) if shape in CHOICES else shapes[shape]:
        _check(key, words[key])
    weight = words.get(WEIGHT, 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9:
        raise ValueError(f"weight is a number from 0; got {weight!r}")
    return Row(where, shape, words, float(weight))


def _unknown(given: Sequence[str], shapes: Mapping[str, tuple[str, ...]]) -> str:
    known = sorted({key for keys in shapes.values() for key in keys} | {WEIGHT})
    strange = [key for key in given if key not in known]
    hint = did_you_mean(strange[0], known) if strange else ""
    wanted = "; ".join(" + ".join(keys) for keys in shapes.values())
    return f"keys {', '.join(given) or 'none'}{hint} (a row has: {wanted}; and perhaps {WEIGHT})"


def _check(key: str, value: Any) -> None:
    if key == "messages":
        _check_messages(value)
    elif not isinstance(value, str):
        raise ValueError(f"{key} must be text")
    elif key not in ("prompt",) and not value:
        raise ValueError(f"{key} is empty: there is nothing to learn")


def _check_number(key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{key} is a number; got {'none' if value is None else repr(value)}")


def _choice(words: Mapping[str, Any]) -> int:
    """Return the place of the right choice, which a row names by its place or its text."""
    choices, answer = words["choices"], words["answer"]
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or not 1 < len(set(choices)) == len(choices):
        raise ValueError("choices is a list of two texts or more, none empty and no two the same")
    if isinstance(answer, str) and answer in choices:
        return int(choices.index(answer))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ValueError(
        f"answer is the right choice's text, or its place, 0 to {len(choices) - 1}; got {answer!r}"
    )


def _check_messages(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is a list of {role, content}")
    for message in value:
        texts = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not texts or not all(isinstance(text, str) for text in message.values()):
            raise ValueError("each message has role and content, both text")
    if not any(message["role"] == "assistant" for message in value):
        raise ValueError("no message is the assistant's: there is nothing to learn")


class Encoder:
    """Turns rows into samples, by a model's tokenizer.

    The answer is scored, and the token that ends it; of a `text` row every token.
    """

    def __init__(self, tokenizer: Any, rows: str, max_length: int, packing: bool = False) -> None:
        self.tokenizer, self.max_length, self.packing = tokenizer, max_length, packing
        self.chat = rows == "chat" or (rows == "auto" and bool(tokenizer.chat_template))
        self.forced = rows
        self.cut: list[str] = []  # rows that were longer than max_length

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Return a sample for each row, for a pair two; `text` rows joined where packed."""
        if self.packing:
            return self._packed(rows)
        found = [sample for row in rows for sample in self._of(row)]
        scored = [any(label != UNSCORED for label in sample.labels[1:]) for sample in found]
        if not all(scored):
            row = rows[scored.index(False) // (len(found) // len(rows))]
            raise SourceError(
                f"{row.where}: within max_length {self.max_length} nothing is left to learn; "
                "raise it, or shorten the prompt"
            )
        return found

    def prompt(self, text: str, shots: Sequence[Row] = ()) -> tuple[int, ...]:
        """Return the tokens of a prompt that is to be answered, answered ones before it."""
        if self.chat:
            if not self.tokenizer.chat_template:
                raise SourceError(
                    "the model's tokenizer has no chat template, so prompts are not written as a "
                    "chat; ask for raw rows, or give the base one"
                )
            turns = [
                {"role": role, "content": shot.words[key]}
                for shot in shots
                for role, key in (("user", "prompt"), ("assistant", "completion"))
            ]
            return self._template([*turns, {"role": "user", "content": text}], opened=True)
        before = (f"{s.words['prompt']}{s.words['completion']}\n\n" for s in shots)
        return tuple(self._tokens("".join(before) + text, begin=True))

    def _of(self, row: Row) -> Iterator[Sample]:
        if row.shape == "text":
            yield self._whole(row, row.words["text"])
        elif row.shape == "messages":
            yield self._turns(row, row.words["messages"])
        elif row.shape == "completion":
            yield self._answer(row, row.words["completion"])
        else:
            yield self._answer(row, row.words["chosen"])
            yield self._answer(row, row.words["rejected"])

    def _answer(self, row: Row, answer: str) -> Sample:
        prompt = row.words["prompt"]
        if not self.chat:
            return self._joined(row, self._tokens(prompt, begin=True), self._ended(answer))
        turn = [{"role": "user", "content": prompt}]
        return self._turns(row, [*turn, {"role": "assistant", "content": answer}])

    def _turns(self, row: Row, messages: list[dict[str, str]]) -> Sample:
        """Return a conversation; what the assistant says is scored, and what ends its turn."""
        if not self.tokenizer.chat_template:
            raise SourceError(
                f"{row.where}: the model's tokenizer has no chat template; write prompt and "
                "completion, or give the base one"
            )
        tokens: list[int] = []
        labels: list[int] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:i], opened=True)
            after = self._template(messages[: i + 1], opened=False)
            self._require_prefix(row, before, after)
            self._require_prefix(row, tuple(tokens), before)
            labels += [UNSCORED] * (len(before) - len(tokens)) + list(after[len(before) :])
            tokens = list(after)
        return self._sample(row, tokens, labels)

    def _template(self, messages: list[dict[str, str]], *, opened: bool) -> tuple[int, ...]:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened
        )
        text = text if opened else text.rstrip("\n")
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _require_prefix(self, row: Row, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        if after[: len(before)] != before:
            raise SourceError(
                f"{row.where}: the chat template writes earlier turns otherwise once an answer "
                "follows, so where the answer begins is not sure; write prompt and completion with "
                "`rows: raw`"
            )

    def _whole(self, row: Row, text: str) -> Sample:
        tokens = [*self._tokens(text, begin=True), *self._end()]
        return self._sample(row, tokens, tokens)

    def _joined(self, row: Row, prompt: list[int], answer: list[int]) -> Sample:
        return self._sample(row, [*prompt, *answer], [UNSCORED] * len(prompt) + answer)

    def _tokens(self, text: str, *, begin: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=begin)["input_ids"])

    def _ended(self, answer: str) -> list[int]:
        return [*self._tokens(answer, begin=False), *self._end()]

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def _sample(self, row: Row, tokens: Sequence[int], labels: Sequence[int]) -> Sample:
        if len(tokens) > self.max_length:
            self.cut.append(row.where)
        most = self.max_length
        return Sample(tuple(tokens[:most]), tuple(labels[:most]), row.weight)

    def _packed(self, rows: Sequence[Row]) -> list[Sample]:
        """Return `text` rows joined end to end and cut into samples of max_length tokens."""
        odd = next((row for row in rows if row.shape != "text"), None)
        if odd is not None:
            raise SourceError(
                f"{odd.where}: packing joins rows of `text`; answers to prompts are not joined, "
                "for each would see the others"
            )
        stream = [
            token
            for row in rows
            for token in [*self._tokens(row.words["text"], begin=True), *self._end()]
        ]
        cuts = [stream[i : i + self.max_length] for i in range(0, len(stream), self.max_length)]
        return [Sample(tuple(part), tuple(part)) for part in cuts if len(part) > 1]
