"""Numbers and text as a page shows them."""

from __future__ import annotations

import html
import math
import re

from mergekit_ft.reports.report import Cell, Value

UNSEEN = re.compile(  # controls, marks that turn the direction of text, halves of characters
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
MINUS = "\u2212"


def visible(text: str) -> str:
    """Return text in which nothing hides: what cannot be seen is written out."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def escaped(text: str) -> str:
    """Return any text, safe within HTML, in an element or in quotes."""
    return html.escape(visible(text), quote=True)


def figure(value: Value, unit: str = "") -> str:
    """Return a number with three digits and its unit; a dash where there is none."""
    if value is None:
        return "\u2013"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}infinite"
    if unit == "%":
        return f"{_near(100 * value, 100) if 0.9 < value < 1 else _short(100 * value)}%"
    return f"{_short(value)}{f' {unit}' if unit else ''}"


def cosine(value: float | None) -> str:
    """Return a cosine with six digits, more where it would look like 1 and is not."""
    if value is None:
        return "\u2013"
    return _near(value, 1, 6) if 0 < value < 1 else f"{value:.6f}".replace("-", MINUS)


def _near(value: float, whole: int, places: int = 1) -> str:
    """Return a number below a whole one with as many places as tell it from that."""
    while float(text := f"{value:.{places}f}") >= whole and places < 17:
        places += 1
    return text


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    size = abs(value)
    if not 1e-3 <= size < 1e6:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits}e{int(power)}".replace("-", MINUS)
    places = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}".replace("-", MINUS)


def cell(value: Cell, unit: str = "") -> str:
    """Return what stands in a table: text as it is, numbers short."""
    return value if isinstance(value, str) else figure(value, unit)
