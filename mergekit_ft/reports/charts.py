"""Histograms as SVG within the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mergekit_ft.reports.figures import escaped, figure
from mergekit_ft.reports.report import Histograms, Panel


class Frame(NamedTuple):
    """How large a histogram is drawn, in CSS pixels at its usual width."""

    bar: int  # of a bar's place
    high: int
    large: bool


SMALL, LARGE = Frame(20, 84, False), Frame(62, 170, True)
TOP = 18  # room above the highest bar
WRITTEN = 0.001  # share from which on a bar's is written out


def histograms(part: Histograms, key: str) -> Iterator[str]:
    """Yield histograms side by side; each is scaled to its own highest bar."""
    yield f'<section class="charts" aria-labelledby="{key}">'
    yield f'<h2 id="{key}">{escaped(part.title)}</h2>'
    if part.meaning:
        yield f'<p class="meaning">{escaped(part.meaning)}</p>'
    yield '<div class="panels">'
    for number, panel in enumerate(part.panels):
        large = number == 0 and part.first_large
        yield from _panel(part, panel, LARGE if large else SMALL)
    yield "</div></section>"


def _panel(part: Histograms, panel: Panel, frame: Frame) -> Iterator[str]:
    total = sum(panel.counts)
    shares = [count / total if total else 0.0 for count in panel.counts]
    yield f'<figure class="panel{" large" if frame.large else ""}">'
    note = f"<span>{escaped(panel.note)}</span>" if panel.note else ""
    yield f"<figcaption><b><bdi>{escaped(panel.name)}</bdi></b>{note}</figcaption>"
    if total:
        yield from _drawing(part, panel, shares, frame)
    else:
        yield '<p class="empty">nothing to show</p>'
    yield "</figure>"


def _drawing(part: Histograms, panel: Panel, shares: list[float], frame: Frame) -> Iterator[str]:
    wide, floor = len(shares) * frame.bar, TOP + frame.high
    high = floor + (44 if frame.large and part.axis else 18)
    label = f"{panel.name}: {part.of or 'counts'} by {part.axis or 'bin'}. " + ", ".join(
        f"{name}: {figure(share, '%')}" for name, share in zip(part.bins, shares, strict=True)
    )
    yield f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escaped(label)}">'
    highest = max(shares)
    for place, (name, share) in enumerate(zip(part.bins, shares, strict=True)):
        yield from _bar(place, name, share, share / highest, frame)
    yield f'<line class="floor" x1="0" x2="{wide}" y1="{floor}" y2="{floor}"/>'
    if not frame.large:
        yield from _ends(part, wide, floor + 13)
    elif part.axis:
        yield f'<text class="axis" x="{wide / 2:g}" y="{high - 6}">{escaped(part.axis)}</text>'
    yield "</svg>"


def _ends(part: Histograms, wide: int, at: int) -> Iterator[str]:
    """Yield the first bin's and the last bin's name, where all have no room."""
    yield f'<text class="bin first" x="0" y="{at}">{escaped(part.bins[0])}</text>'
    if len(part.bins) > 1:
        yield f'<text class="bin last" x="{wide}" y="{at}">{escaped(part.bins[-1])}</text>'


def _bar(place: int, name: str, share: float, of_highest: float, frame: Frame) -> Iterator[str]:
    tall, gap = round(of_highest * frame.high, 1), frame.bar // 8
    middle, top = place * frame.bar + frame.bar / 2, TOP + frame.high - tall
    said = f"{name}: {figure(share, '%')}"
    yield f'<g class="bar"><title>{escaped(said)}</title>'
    if share:
        yield (
            f'<rect x="{place * frame.bar + gap}" y="{top:g}" width="{frame.bar - 2 * gap}" '
            f'height="{max(tall, 0.8):g}" rx="2"/>'
        )
    if frame.large and share >= WRITTEN:
        yield f'<text class="value" x="{middle:g}" y="{top - 5:g}">{_percent(share)}</text>'
    if frame.large:
        yield f'<text class="bin" x="{middle:g}" y="{TOP + frame.high + 15}">{escaped(name)}</text>'
    yield "</g>"


def _percent(share: float) -> str:
    """Return a share, short enough to stand above a bar."""
    return f"{share * 100:.0f}%" if share >= 0.0995 else f"{share * 100:.1f}%"
