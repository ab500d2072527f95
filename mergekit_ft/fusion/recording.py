"""What a model says at every place of calibration texts, on disk: a file that is mapped.

`log_probabilities` (n, vocabulary) in a dtype of choice, not below FLOOR; `said` (n,) float32,
those of the tokens that came, before they were rounded. A journal beside it tells which batches
are whole, so that a killed run goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ft.blocks import view_of
from mergekit_ft.data.rows import UNSCORED, Sample
from mergekit_ft.errors import OperatorError, WriteError
from mergekit_ft.fusion.texts import Texts, scored
from mergekit_ft.journal import Journal
from mergekit_ft.models.decoding import padded
from mergekit_ft.models.speaker import Speaker
from mergekit_ft.models.streaming import Batch, Streamed
from mergekit_ft.sources.dtypes import CODE, SIZE

LOGS, SAID = "log_probabilities", "said"  # tensors of a file
FLOOR = -1e4  # least log-probability kept: differences of two stay numbers
ROWS, PLACES = 16, 512  # of a batch, at most, unless one row has more
Watch = Callable[[int], None]  # hears of places done


@dataclass(frozen=True)
class Shape:
    """How much is kept of each model."""

    places: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Return the bytes of a log-probability."""
        return SIZE[CODE[self.dtype]]

    @property
    def nbytes(self) -> int:
        """Return the bytes of a file without its header."""
        return self.places * (self.vocabulary * self.size + 4)

    def header(self) -> bytes:
        """Return the head of a safetensors file."""
        logs = self.places * self.vocabulary * self.size
        words = {
            LOGS: _entry(CODE[self.dtype], [self.places, self.vocabulary], 0, logs),
            SAID: _entry("F32", [self.places], logs, self.nbytes),
        }
        text = json.dumps(words).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _entry(code: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": code, "shape": shape, "data_offsets": [start, stop]}


class Recording:
    """The file of one model, whole or not yet."""

    def __init__(self, path: Path, shape: Shape, texts: Texts) -> None:
        self.path, self.shape = path, shape
        self.samples = [sample for part in texts.parts for sample in part.samples]
        self.starts = [0, *accumulate(map(scored, self.samples))]
        self.batches = list(batches(self.samples))
        self.journal = path.with_suffix(".journal")

    @property
    def whole(self) -> bool:
        """Say whether every batch is there."""
        if not (self.path.is_file() and self.journal.is_file()):
            return False
        lines = self.journal.read_bytes().splitlines(keepends=True)
        return sum(line.endswith(b"\n") for line in lines) == 1 + len(self.batches)

    @property
    def there(self) -> int:
        """Return the bytes that it takes on disk now."""
        return self.path.stat().st_blocks * 512 if self.path.is_file() else 0

    def record(self, model: Speaker | Streamed, identity: str, watch: Watch) -> float:
        """Ask for what is missing; return the seconds. WriteError where a disk is full."""
        began = time.monotonic()
        try:
            self._record(model, identity, watch)
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be written: {error.strerror or error}; what is there is kept "
                "and the same command goes on from it"
            ) from error
        return time.monotonic() - began

    def _record(self, model: Speaker | Streamed, identity: str, watch: Watch) -> None:
        if not self.path.is_file():
            self.journal.unlink(missing_ok=True)
        journal = Journal(self.journal, identity)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            header = self.shape.header()
            os.pwrite(descriptor, header, 0)
            os.ftruncate(descriptor, len(header) + self.shape.nbytes)
            left = [n for n in range(len(self.batches)) if str(n) not in journal.findings]
            watch(sum(map(self._count, set(range(len(self.batches))) - set(left))))
            for number, logs in zip(left, self._heard(model, left), strict=True):
                self._put(descriptor, len(header), self.batches[number], logs)
                os.fsync(descriptor)
                journal.note_finding(str(number), len(self.batches[number]))
                journal.flush()
                watch(self._count(number))
        finally:
            os.close(descriptor)
            journal.close()

    def _count(self, number: int) -> int:
        return sum(scored(self.samples[i]) for i in self.batches[number])

    def _heard(self, model: Speaker | Streamed, left: list[int]) -> Iterator[Tensor]:
        """Yield (m, vocabulary) float32 log-probabilities of each batch that is missing."""
        groups = [[self.samples[i] for i in self.batches[number]] for number in left]
        vocabulary = self.shape.vocabulary
        if not isinstance(model, Streamed):
            for group in groups:
                yield said(model, group, vocabulary)[0]
            return
        asked = [questions(group) for group in groups]
        texts = [Batch(question.tokens, question.mask) for question in asked]
        wanted = [(where[:, 0], where[:, 1]) for where in (q.at.nonzero() for q in asked)]
        for logits in model.logits(texts, wanted):
            yield torch.log_softmax(logits[:, :vocabulary].float().cpu(), -1)

    def _put(self, descriptor: int, start: int, rows: Sequence[int], logs: Tensor) -> None:
        """Write a batch to its places."""
        targets = questions([self.samples[i] for i in rows]).targets
        true = logs.gather(1, targets[:, None])[:, 0]
        if not bool(torch.isfinite(true).all()):
            raise OperatorError("the model gives a scored token no finite log-probability")
        width = self.shape.vocabulary * self.shape.size
        second = start + self.shape.places * width
        stored = logs.clamp_(min=FLOOR).to(self.shape.dtype)
        at = 0
        for i in rows:
            count = scored(self.samples[i])
            some = slice(at, at + count)
            _write(descriptor, view_of(stored[some]), start + self.starts[i] * width)
            _write(descriptor, view_of(true[some].contiguous()), second + self.starts[i] * 4)
            at += count


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, at)
        data, at = data[done:], at + done


def batches(samples: Sequence[Sample]) -> list[list[int]]:
    """Return numbers of samples of like length, longest first: always the same ones together."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].tokens), i))
    found: list[list[int]] = []
    places = 0
    for i in order:
        count = scored(samples[i])
        if not found or len(found[-1]) == ROWS or places + count > PLACES:
            found.append([])
            places = 0
        found[-1].append(i)
        places += count
    return found


class Questions(NamedTuple):
    """Samples as one rectangle."""

    tokens: Tensor  # (b, n), padded on the right
    mask: Tensor  # (b, n) 1 where there is a token
    at: Tensor  # (b, n) where the next token is scored
    targets: Tensor  # (m,) the tokens that came there


def questions(samples: Sequence[Sample]) -> Questions:
    """Return what is asked about some samples."""
    tokens, mask = padded([sample.tokens for sample in samples], 0, left=False)
    labels, _ = padded([sample.labels for sample in samples], UNSCORED, left=False)
    at = torch.zeros_like(mask, dtype=torch.bool)
    at[:, :-1] = labels[:, 1:] != UNSCORED
    return Questions(tokens, mask, at, labels[:, 1:][at[:, :-1]])


def said(speaker: Speaker, samples: Sequence[Sample], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return (m, vocabulary) float32 log-probabilities at scored places and (m,) what came."""
    tokens, mask, at, targets = questions(samples)
    logits = speaker.read(tokens, mask, at)[:, :vocabulary].float().cpu()
    return torch.log_softmax(logits, -1), targets
