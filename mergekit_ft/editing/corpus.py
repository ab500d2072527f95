"""A text file as windows of tokens: JSONL rows of `text`, each a document, or plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError

WINDOW = 512  # tokens, at most
STRETCH = 1 << 16  # characters of plain text, at least, that are cut together; they end with a line
READ = 1 << 20  # bytes at a time
ROWS = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Corpus:
    """Text that a model is shown, from the file's start on."""

    path: Path
    sha256: str  # of the file
    tokenizer: Any
    window: int = WINDOW

    def windows(self) -> Iterator[tuple[int, ...]]:
        """Yield windows of tokens; none goes on into another document."""
        for text in _documents(self.path):
            tokens = self.tokenizer(text)["input_ids"]
            for start in range(0, len(tokens), self.window):
                yield tuple(tokens[start : start + self.window])

    def rounds(self, tokens: int) -> Iterator[list[tuple[int, ...]]]:
        """Yield windows in lots of at least so many tokens; the last lot may have fewer."""
        lot: list[tuple[int, ...]] = []
        held = 0
        for window in self.windows():
            lot.append(window)
            held += len(window)
            if held >= tokens:
                yield lot
                lot, held = [], 0
        if lot:
            yield lot

    @property
    def identity(self) -> str:
        """Return what decides the windows: the text, the tokenizer, their length."""
        known = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return f"{self.sha256} {known} {self.window}"


def open_corpus(path: str | Path, tokenizer: Any, most: int | None = None) -> Corpus:
    """Return a text file as a corpus; `most` are the tokens that fit into the model."""
    at = Path(path).expanduser()
    try:
        with open(at, "rb") as file:
            sha = hashlib.sha256()
            while part := file.read(READ):
                sha.update(part)
    except OSError as error:
        raise SourceError(f"{at}: cannot be read: {error.strerror or error}") from error
    return Corpus(at, sha.hexdigest(), tokenizer, min(WINDOW, most or WINDOW))


def _documents(path: Path) -> Iterator[str]:
    """Yield the documents that hold text; SourceError where the file is none of text."""
    found = False
    try:
        with open(path, encoding="utf-8-sig") as lines:
            documents = _rows(path, lines) if path.suffix in ROWS else _stretches(lines)
            for text in documents:
                found = True
                yield text
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: not UTF-8 text; statistics are taken over plain text or JSONL"
        ) from error
    if not found:
        raise SourceError(f"{path}: holds no text to take statistics over")


def _rows(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}:{number}: not JSON: {error.msg}") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise SourceError(
                f'{path}:{number}: a row of text is {{"text": "..."}}; a file of plain text has '
                f"another ending than {' or '.join(ROWS)}"
            )
        if text:
            yield text


def _stretches(lines: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= STRETCH:
            yield "".join(held)
            held, size = [], 0
    if "".join(held).strip():
        yield "".join(held)
