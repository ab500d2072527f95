"""Text about nothing in particular, which we wrote and ship: what a model should not lose."""

from __future__ import annotations

from pathlib import Path

from mergekit_ft.data.rows import Row

NEUTRAL = Path(__file__).with_name("neutral.txt")


def neutral_rows() -> list[Row]:
    """Return its paragraphs as rows of `text`."""
    paragraphs = NEUTRAL.read_text(encoding="utf-8").strip().split("\n\n")
    where = NEUTRAL.name
    return [
        Row(f"{where}: {i}", "text", {"text": text}, 1.0) for i, text in enumerate(paragraphs, 1)
    ]
