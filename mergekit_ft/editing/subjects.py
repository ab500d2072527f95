"""Where a subject ends in a text, in tokens."""

from __future__ import annotations

from typing import Any

from mergekit_ft.errors import SourceError


def last_token(tokenizer: Any, text: str, subject: str) -> tuple[tuple[int, ...], int]:
    """Return a text's tokens and the place of the one that holds the subject's last character.

    Of a subject that occurs again the last occurrence counts.
    """
    start = text.rfind(subject)
    if not subject or start < 0:
        raise SourceError(f"the subject {subject!r} does not occur in {text!r}")
    if not tokenizer.is_fast:
        raise SourceError(
            "the model's tokenizer does not say where its tokens lie in a text (it has no "
            "tokenizer.json), so a subject cannot be found; save a fast tokenizer beside the model"
        )
    made = tokenizer(text, return_offsets_mapping=True)
    last = start + len(subject) - 1
    places = made["offset_mapping"]
    found = [i for i, (begin, end) in enumerate(places) if begin <= last < end]
    if not found:
        raise SourceError(f"no token of {text!r} holds the end of the subject {subject!r}")
    return tuple(made["input_ids"]), found[-1]
