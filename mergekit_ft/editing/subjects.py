"""Where a subject ends in a prompt as a model is asked it, in tokens."""

from __future__ import annotations

from mergekit_ft.editing.encoding import Encoder, Tokens
from mergekit_ft.errors import SourceError


def last_token(encoder: Encoder, prompt: str, subject: str) -> tuple[Tokens, int]:
    """Return a prompt's tokens and the place of the one that holds the subject's last character.

    Of a subject that occurs again the last occurrence counts.
    """
    tokenizer, text = encoder.tokenizer, encoder.text(prompt)
    start = text.rfind(subject)
    if not subject or subject not in prompt or start < 0:
        raise SourceError(f"the subject {subject!r} does not occur in {prompt!r}")
    if not tokenizer.is_fast:
        raise SourceError(
            "the model's tokenizer does not say where its tokens lie in a text (it has no "
            "tokenizer.json), so a subject cannot be found; save a fast tokenizer beside the model"
        )
    raw = encoder.template == "raw"
    places = tokenizer(text, add_special_tokens=raw, return_offsets_mapping=True)["offset_mapping"]
    last = start + len(subject) - 1
    found = [i for i, (begin, end) in enumerate(places) if begin <= last < end]
    if not found:
        raise SourceError(f"no token of {prompt!r} holds the end of the subject {subject!r}")
    return encoder.prompt(prompt), found[-1]
