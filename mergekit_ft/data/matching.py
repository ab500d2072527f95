"""When one answer is another: to the letter, or but for what does not matter."""

from __future__ import annotations

import re
import string

ARTICLES = re.compile(r"\b(a|an|the)\b")
UNMARKED = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text without case, punctuation, articles and needless blanks, as SQuAD scores."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(UNMARKED)).split())
