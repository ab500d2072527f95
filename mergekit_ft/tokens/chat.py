"""The chat template that a plan asks for, tried, and where the output keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.plan import Reading
from mergekit_ft.plan.tokenizers import AUTO
from mergekit_ft.sources import Source
from mergekit_ft.tokens.files import Sides
from mergekit_ft.tokens.rendering import Unrenderable, parsed, rendered
from mergekit_ft.tokens.templates import NAMED, most_common, template_files, template_of
from mergekit_ft.tokens.unaligned import named
from mergekit_ft.tokens.vocabulary import (
    OTHERS,
    SETTINGS,
    TOKENIZER,
    Files,
    files_of,
    read_vocabulary,
    settings,
)

MARKER = re.compile(r"<\|[^|<>\s]+\|>")  # what looks like a token of its own
PATH = ("chat_template",)
UNRENDERED = "this chat template does not render"


def template_change(
    reading: Reading, donor: Source, models: Sequence[Source]
) -> tuple[Sides, tuple[str, ...]] | None:
    """Return the donor's side files that a plan's chat template changes, and what to say of it."""
    assert reading.plan is not None
    asked = reading.plan.chat_template
    if asked is None:
        return None
    try:
        return _change(reading, asked, donor, models)
    except (SourceError, UnicodeDecodeError) as error:
        reading.add(PATH, str(error), kind="source")
    return None


def check_template(reading: Reading) -> None:
    """Report a chat template that is not Jinja, which is known before a model is opened."""
    asked = reading.plan.chat_template if reading.plan is not None else None
    if asked is None or "{" not in asked:
        return
    try:
        parsed(asked)
    except Unrenderable as error:
        reading.add(PATH, f"{UNRENDERED}: {error}")


def _change(
    reading: Reading, asked: str, donor: Source, models: Sequence[Source]
) -> tuple[Sides, tuple[str, ...]] | None:
    chosen = _chosen(asked, models)
    if chosen is None:
        named = ", ".join(model.reference for model in models)
        message = f"no model has a chat template ({named}); name one, or write its text"
        reading.add(PATH, message, aside=PATH)
        return None
    text, notes = chosen
    files = files_of(donor)
    if not files.keys() & {TOKENIZER, SETTINGS, *OTHERS}:
        message = f"{donor.reference} has no tokenizer that a chat template could belong to"
        reading.add(PATH, message, key=True)
        return None
    try:
        shown = rendered(text, dict(_specials(files)))
    except Unrenderable as error:
        reading.add(PATH, f"{UNRENDERED}: {error}")
        return None
    notes += _split_markers(shown, donor)
    if text == template_of(files):
        return {}, tuple(notes)
    changed: Sides = dict(template_files(text, files))
    return changed, tuple(notes)


def _chosen(asked: str, models: Sequence[Source]) -> tuple[str, list[str]] | None:
    """Return the text of a template, and where it is from if that was not said."""
    if asked != AUTO:
        return NAMED.get(asked, asked), []
    found = most_common([(model.reference, template_of(files_of(model))) for model in models])
    return None if found is None else (found[0], [found[1]])


def _specials(files: Files) -> Iterator[tuple[str, str]]:
    """Yield the special tokens that a tokenizer gives its template."""
    said: dict[str, Any] = settings(files, "special_tokens_map.json") | settings(files)
    for key, value in said.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            yield key, text


def _split_markers(shown: str, donor: Source) -> list[str]:
    """Say which markers of a template are no tokens."""
    vocabulary = read_vocabulary(files_of(donor), donor.reference)
    known = vocabulary.ids if vocabulary is not None else {}
    split = [mark for mark in dict.fromkeys(MARKER.findall(shown)) if mark not in known]
    if not split:
        return []
    return [f"chat_template: {named(split)} not in the vocabulary: each comes out in pieces"]
