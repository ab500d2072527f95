"""The colours of heat maps: light to dark for day, dark to light for night, one order for all eyes.

Lightness alone tells the order, so the maps read the same without any sense of colour and in print.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_ft.reports.report import Measure, Scale

STEPS = 24  # of colour
FEW = 0.05  # share of the values that a logarithmic ramp may begin above
DAY = ("#eef3ec", "#cbe3d7", "#98cbc3", "#5fb0b8", "#3489ad", "#26659c", "#283f85", "#271d5f")
NIGHT = ("#1c2431", "#22395a", "#1d5a7c", "#1f7c8b", "#46a08c", "#86c384", "#cfe083", "#fbf5ae")


@dataclass(frozen=True)
class Ramp:
    """From a measure's values to steps of colour."""

    low: float  # of the first step, which also stands for what is less
    high: float
    scale: Scale
    clipped: bool = False  # there is less than `low`

    def step(self, value: float) -> int:
        """Return 0 for the lowest to STEPS - 1 for the highest."""
        low, high, at = (self._bent(x) for x in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 1.0
        return min(STEPS - 1, max(0, int(share * STEPS)))

    def at(self, share: float) -> float:
        """Return the value that lies at a share of the way."""
        if self.scale == "linear":
            return self.low + share * (self.high - self.low)
        return float(self.low * (self.high / self.low) ** share)

    def _bent(self, value: float) -> float:
        return math.log(value) if self.scale == "log" else value


def ramp_of(measure: Measure) -> Ramp | None:
    """Return the ramp over a measure's finite values; zeros, which are marked, stand apart.

    None where nothing is to be coloured. A logarithm is taken only of what is above zero, and
    begins where all but the few smallest are, which would take the colours from the others.
    """
    held = [v for row in measure.values for v in row if v is not None and math.isfinite(v) and v]
    if not held:
        return None
    scale: Scale = "linear" if min(held) <= 0 else measure.scale
    if scale == "log":
        low = sorted(held)[int(FEW * len(held))]
        return Ramp(float(low), float(max(held)), scale, low > min(held))
    return Ramp(float(min(0, *held)), float(max(held)), scale)


def blended(stops: Sequence[str], share: float) -> str:
    """Return the colour at a share of the way along the stops."""
    place = share * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    pair = (_rgb(stops[first]), _rgb(stops[first + 1]))
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(*pair, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def contrasting(colour: str) -> str:
    """Return the ink, black or white, that can be read on a colour."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Return the ratio of contrast of two colours, as WCAG 2 defines it."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rules() -> Iterator[str]:
    """Yield the style of each step, for day and for night."""
    yield from _rules(DAY)
    yield "@media screen and (prefers-color-scheme: dark) {"
    yield from _rules(NIGHT)
    yield "}"


def _rules(stops: Sequence[str]) -> Iterator[str]:
    for step in range(STEPS):
        colour = blended(stops, step / (STEPS - 1))
        yield f".s{step} {{ background: {colour}; color: {contrasting(colour)}; fill: {colour}; }}"


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _luminance(colour: str) -> float:
    parts = [part / 255 for part in _rgb(colour)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
