"""Files of edits -> edits, each with what it is asked by afterwards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ft.editing.importers import layout_of
from mergekit_ft.errors import SourceError

SHOWN = 10  # faulty lines that are told
BLANK = re.compile(r"[ \t\n\r]*")
WEIGHTS = 1e9  # below which a weight is


@dataclass(frozen=True)
class Probe:
    """A prompt that an edit is asked by, and the answers that are right; none may be known."""

    prompt: str
    answers: tuple[str, ...] = ()

    @property
    def answer(self) -> str | None:
        """Return the first right answer."""
        return self.answers[0] if self.answers else None


@dataclass(frozen=True)
class Edit:
    """Of `prompt` the model shall say `target`."""

    where: str  # file:line
    prompt: str
    target: str
    subject: str | None = None
    rephrase: tuple[str, ...] = ()  # other words for the prompt: the same target
    locality: tuple[Probe, ...] = ()  # of which the model shall say what it said
    portability: tuple[Probe, ...] = ()  # what follows from the edit
    id: str | None = None
    weight: float = 1.0


def read_edits(paths: Sequence[str | os.PathLike[str]]) -> list[Edit]:
    """Return the edits of files, JSONL or a JSON list; every faulty one is told at once.

    The rows are ours or of a layout of `importers`, which their keys say; of one layout a file.
    """
    faults: list[str] = []
    found = [edit for path in paths for edit in _file(Path(path).expanduser(), faults)]
    if not found and not faults:
        faults.append(f"{', '.join(map(str, paths))}: no edits")
    ids: dict[str, Edit] = {}
    for edit in found:
        if edit.id is not None and ids.setdefault(edit.id, edit) is not edit:
            faults.append(f"{edit.where}: id {edit.id!r} is that of {ids[edit.id].where} too")
    if faults:
        more = f"\n... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise SourceError("\n".join(faults[:SHOWN]) + more)
    return found


def edit_of(words: Any, where: str) -> Edit:
    """Return an edit of our keys, as `words_of` gives them."""
    try:
        if not isinstance(words, dict):
            raise ValueError("an edit is a JSON object")
        return _edit(words, where)
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from error


def words_of(edit: Edit) -> dict[str, Any]:
    """Return an edit as a row of our JSONL; what it does not have is left out."""
    words: dict[str, Any] = {} if edit.id is None else {"id": edit.id}
    words |= {"prompt": edit.prompt, "target": edit.target}
    if edit.subject is not None:
        words["subject"] = edit.subject
    if edit.rephrase:
        words["rephrase"] = list(edit.rephrase)
    for key, probes in (("locality", edit.locality), ("portability", edit.portability)):
        if probes:
            words[key] = [_probe_words(probe) for probe in probes]
    return words if edit.weight == 1 else words | {"weight": edit.weight}


def _probe_words(probe: Probe) -> dict[str, Any]:
    if not probe.answers:
        return {"prompt": probe.prompt}
    one = len(probe.answers) == 1
    return {"prompt": probe.prompt, "answer": probe.answers[0] if one else list(probe.answers)}


def _file(path: Path, faults: list[str]) -> Iterator[Edit]:
    layouts: dict[str, str] = {}  # and where each was first seen
    for where, words in _rows(path, faults):
        try:
            if not isinstance(words, dict):
                raise ValueError("an edit is a JSON object")
            layout = layout_of(words)
            layouts.setdefault(layout.name, where)
            yield _edit(layout.read(words), where)
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if len(layouts) > 1:
        told = ", ".join(f"{name} ({where})" for name, where in layouts.items())
        faults.append(f"{path}: edits of different layouts: {told}; keep those of one")


def _rows(path: Path, faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a file begins, and the row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        faults.append(f"{path}: not UTF-8 text (byte {error.start}); edits are JSON or JSONL files")
        return
    except OSError as error:
        faults.append(f"{path}: cannot be read: {error.strerror or error}")
        return
    yield from (_listed if text.lstrip().startswith("[") else _lines)(path, text, faults)


def _lines(path: Path, text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"{path}:{number}: not JSON: {_told(error)}")


def _listed(path: Path, text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON list, each with the line where it begins."""
    decoder, at, line, told = json.JSONDecoder(), text.index("[") + 1, 1, 0
    try:
        at = _next(text, at)
        while text[at : at + 1] != "]":
            line += text.count("\n", told, at)
            told = at
            item, end = decoder.raw_decode(text, at)
            yield f"{path}:{line}", item
            at = _next(text, end)
            if text[at : at + 1] == ",":
                at = _next(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("nothing after a comma", text, at)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("no comma, nor the list's end", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("text after the list's end", text, _next(text, at + 1))
    except json.JSONDecodeError as error:
        faults.append(f"{path}:{error.lineno}: not JSON: {_told(error)}")
    except (ValueError, RecursionError) as error:
        faults.append(f"{path}:{line}: not JSON: {_told(error)}")


def _next(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def _told(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _edit(words: Mapping[str, Any], where: str) -> Edit:
    """Return an edit of our keys; ValueError says what is wrong with it."""
    for key in ("prompt", "target"):
        if not isinstance(words.get(key), str):
            raise ValueError(f"{key} must be text")
    if not words["prompt"].strip():
        raise ValueError("prompt is empty")
    subject, name = words.get("subject"), words.get("id")
    if not isinstance(subject, str | None) or subject == "":
        raise ValueError("subject must be text, and not empty")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError("id must be text or a whole number")
    edit = Edit(
        where,
        words["prompt"],
        words["target"],
        subject,
        tuple(probe.prompt for probe in _probes(words, "rephrase")),
        tuple(_probes(words, "locality")),
        tuple(_probes(words, "portability")),
        None if name is None else str(name),
        _weight(words.get("weight", 1.0)),
    )
    _require_text(edit)
    return edit


def _weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"weight is a number above 0; got {weight!r}")
    if not 0 < weight < WEIGHTS:
        raise ValueError(f"weight is a number above 0 and below {WEIGHTS:.0e}; got {weight!r}")
    return float(weight)


def _probes(words: Mapping[str, Any], key: str) -> Iterator[Probe]:
    """Yield prompts; those of `portability` need their answer, those of `rephrase` have none."""
    given = words.get(key)
    for item in given if isinstance(given, list) else () if given is None else (given,):
        bare = isinstance(item, str) and key != "portability"
        found = {"prompt": item} if bare else item
        if key == "rephrase" and not bare:
            raise ValueError("rephrase is a list of texts")
        if not isinstance(found, dict) or not {"prompt"} <= found.keys() <= {"prompt", "answer"}:
            raise ValueError(f'{key} is a list of {{"prompt": ..., "answer": ...}}')
        prompt, answer = found["prompt"], found.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{key}: a prompt must be text, and not empty")
        answers = answer if isinstance(answer, list) else () if answer is None else (answer,)
        if any(not isinstance(text, str) or not text.strip() for text in answers):
            raise ValueError(f"{key}: an answer must be text, and not empty")
        if key == "portability" and not answers:
            raise ValueError("portability: each prompt needs the answer that the edit makes right")
        yield Probe(prompt, tuple(answers))


def _require_text(edit: Edit) -> None:
    """Refuse halves of characters, which JSON may hold and no tokenizer takes."""
    try:
        json.dumps(words_of(edit), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"half a character, {half!r}: no tokenizer takes it") from error
