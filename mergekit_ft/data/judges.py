"""Whether an answer is right: by its text, by a pattern, by a Python function, by a command."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable

from mergekit_ft.data.matching import normalised
from mergekit_ft.data.rows import Row
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.registry import did_you_mean

Judge = Callable[[str, Row], bool]  # (answer, row with prompt and completion)
KINDS = ("exact", "normalised", "regex:PATTERN", "python:MODULE:FUNCTION", "command:WORDS")
RIGHT, WRONG = 0, 1  # exit codes of a command


def judge_of(words: str, seconds: float = 60.0) -> Judge:
    """Return the judge that words name; a command may take so many seconds an answer.

    PlanError where they name none.
    """
    kind, _, rest = words.partition(":")
    if kind in ("exact", "normalised") and not rest:
        return _exact if kind == "exact" else _normalised
    if not rest or kind not in ("regex", "python", "command"):
        hint = did_you_mean(kind, ("exact", "normalised", "regex", "python", "command"))
        raise PlanError(f"judge '{words}' is none{hint} (valid: {', '.join(KINDS)})")
    if kind == "regex":
        return _matcher(rest)
    return _function(rest) if kind == "python" else _command(rest, seconds)


def _exact(answer: str, row: Row) -> bool:
    return answer.strip() == str(row.words["completion"]).strip()


def _normalised(answer: str, row: Row) -> bool:
    return normalised(answer) == normalised(row.words["completion"])


def _matcher(pattern: str) -> Judge:
    """Return a judge of what a pattern finds last in answer and completion: they must be equal."""
    try:
        made = re.compile(pattern)
    except re.error as error:
        raise PlanError(f"judge: '{pattern}' is no pattern: {error}") from error
    if made.groups > 1:
        raise PlanError(f"judge: '{pattern}' has {made.groups} groups; write one, or none")

    def last(text: str) -> str | None:
        found = list(made.finditer(text))
        return found[-1].group(made.groups) if found else None

    def judge(answer: str, row: Row) -> bool:
        wanted = last(row.words["completion"])
        if wanted is None:
            raise SourceError(f"{row.where}: the judge's pattern finds nothing in its completion")
        return last(answer) == wanted

    return judge


def _function(place: str) -> Judge:
    """Return a judge that calls function(prompt, answer, completion), which says true or false."""
    module, _, name = place.rpartition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"judge: python:{place} is not there: {error}") from error

    def judge(answer: str, row: Row) -> bool:
        try:
            said = function(row.words["prompt"], answer, row.words["completion"])
        except Exception as error:
            raise SourceError(f"{row.where}: the judge python:{place} raised {error!r}") from error
        if not isinstance(said, bool):
            raise SourceError(
                f"{row.where}: the judge python:{place} gave {said!r}; it must say True or False"
            )
        return said

    return judge


def _command(text: str, seconds: float) -> Judge:
    """Return a judge that is a command: JSON on its stdin, exit code 0 for right, 1 for wrong.

    1 with words on stderr is no verdict: so ends a script that broke.
    """
    words = shlex.split(text)

    def judge(answer: str, row: Row) -> bool:
        given = {"prompt": row.words["prompt"], "answer": answer}
        given["completion"] = row.words["completion"]
        try:
            done = subprocess.run(
                words, input=json.dumps(given), capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise SourceError(
                f"{row.where}: the judge `{text}` took more than {seconds:g} seconds"
            ) from None
        except OSError as error:
            raise PlanError(f"judge: `{text}` cannot be run: {error.strerror}") from error
        told = done.stderr.strip().splitlines()[-1:]
        if done.returncode not in (RIGHT, WRONG) or (done.returncode == WRONG and told):
            raise SourceError(
                f"{row.where}: the judge `{text}` ended with exit code {done.returncode} (0 is "
                f"right, 1 with nothing on stderr is wrong): {(told or ['it said nothing'])[0]}"
            )
        return done.returncode == RIGHT

    return judge
