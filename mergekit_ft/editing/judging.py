"""When an answer is right: where decoding ends it, and what is compared."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ft.data.matching import normalised
from mergekit_ft.models.decoding import Stop

STOP = Stop((".", "\n"), most=32)
PROTOCOL = (
    'greedy decoding, ended before "." or a line\'s end, by a token that ends texts, or after 32 '
    "tokens; right where it equals the answer but for case, punctuation, articles and blanks"
)


def reached(text: str) -> str:
    """Return what decoding would keep of a text."""
    found = [at for at in (text.find(stop) for stop in STOP.strings) if at >= 0]
    return text[: min(found)] if found else text


def right(said: str, answers: Sequence[str]) -> bool:
    """Say whether what was said is one of the right answers."""
    plain = normalised(said)
    return any(plain == normalised(answer) for answer in answers)
