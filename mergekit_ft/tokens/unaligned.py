"""Vocabularies where a plan says nothing of them: rows are merged by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from mergekit_ft.errors import SourceError
from mergekit_ft.plan import Reading, referred
from mergekit_ft.sources import Source
from mergekit_ft.sources.derived import derived
from mergekit_ft.tokens.indexed import rows_of
from mergekit_ft.tokens.vocabulary import (
    TOKENIZER,
    Vocabulary,
    digest_of,
    files_of,
    read_vocabulary,
)

Key = TypeVar("Key")


def check_unaligned(reading: Reading, opened: Mapping[Key, Source]) -> dict[Key, Source]:
    """Report a donor with tokens beyond its rows; return models of other tokens, which say so."""
    key, donor = next(iter(opened.items()))
    mine = _vocabulary(donor)
    if mine is None:
        return {}
    _require_rows(reading, donor, mine)
    found = {}
    for other_key, other in opened.items():
        if other_key != key and (note := _difference(donor, mine, other)) is not None:
            found[other_key] = derived(other, other.values(), other.reader, conflicts=[note])
    return found


def _vocabulary(source: Source) -> Vocabulary | None:
    """Return what tokenizer.json says; None where there is none to be read."""
    files = files_of(source)
    try:
        return read_vocabulary(files, source.reference) if TOKENIZER in files else None
    except SourceError:
        return None  # it comes along as it is: nothing here depends on it


def _require_rows(reading: Reading, donor: Source, mine: Vocabulary) -> None:
    try:
        rows = rows_of(donor)
    except SourceError:
        return
    if mine.size > rows:
        beyond = [token for token, number in mine.ids.items() if number >= rows]
        assert reading.plan is not None
        path, _ = next(iter(referred(reading.plan)))
        reading.add(
            path,
            f"{donor.reference}: its tokenizer has {named(beyond)} beyond the {rows} rows of its "
            "embedding; `tokenizer: {source: base}` gives them rows",
            kind="source",
        )


def _difference(donor: Source, mine: Vocabulary, other: Source) -> str | None:
    if digest_of(files_of(other)) == mine.digest:
        return None
    theirs = _vocabulary(other)
    if theirs is None or theirs.ids == mine.ids:
        return None
    apart = list(_apart(mine, theirs))
    return (
        f"{other.reference}: {named(apart)} of {donor.reference} not at the same id in its "
        "tokenizer; rows are merged by number, `tokenizer: {source: base}` aligns them"
    )


def _apart(mine: Vocabulary, theirs: Vocabulary) -> Iterator[str]:
    yield from (token for token, number in mine.ids.items() if theirs.ids.get(token) != number)


def named(tokens: list[str]) -> str:
    """Return a count and the first few tokens."""
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    noun = "token" if len(tokens) == 1 else "tokens"
    return f"{len(tokens):,} {noun} ({', '.join(map(repr, tokens[:3]))}{more})"
