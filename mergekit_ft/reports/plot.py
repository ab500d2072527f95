"""Heat maps as PNG or SVG, by matplotlib: the extra `plot`."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergekit_ft.errors import WriteError
from mergekit_ft.reports.colours import DAY, contrasting, ramp_of
from mergekit_ft.reports.figures import figure, visible
from mergekit_ft.reports.heat import TICKS, outside, ticks_of
from mergekit_ft.reports.report import HeatMap, Measure, Value
from mergekit_ft.reports.writing import require_room, write

KINDS = (".png", ".svg")
HATCH, PALE, INK = "#c9ced6", "#f7f8fa", "#1d2530"
SHOWN = 40  # labels along the layers, at most
LONGEST = 48  # characters of a label; a title takes twice that


def require_matplotlib(path: Path, *, overwrite: bool) -> None:
    """Refuse, before there is work, what cannot be drawn."""
    if path.suffix.lower() not in KINDS:
        raise WriteError(f"{path}: a chart is a file that ends in {' or '.join(KINDS)}")
    if find_spec("matplotlib") is None:
        raise WriteError(
            f"{path}: charts need matplotlib, which is not installed: "
            "pip install 'mergekit-ft[plot]'"
        )
    require_room(path, overwrite=overwrite)


def draw(part: HeatMap, measure: str, path: Path, *, title: str, overwrite: bool = False) -> None:
    """Draw one measure of a heat map to a file; equal maps make equal bytes."""
    require_matplotlib(path, overwrite=overwrite)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kind = path.suffix.lower()[1:]
    with rc_context({"svg.hashsalt": "mergekit-ft", "text.parse_math": False}):
        found = Figure(figsize=_size(part), layout="constrained", facecolor="white")
        _grid(found, part, part.measure(measure), title)
        held = io.BytesIO()
        told = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        found.savefig(held, format=kind, dpi=160, metadata=told)
    write(path, held.getvalue(), overwrite=overwrite)


def _size(part: HeatMap) -> tuple[float, float]:
    """Return the size in inches."""
    wide = 3.2 + (0.9 if part.written else 0.22) * min(len(part.columns), 120)
    return max(6.5, wide), 1.7 + 0.26 * len(part.rows)


def _grid(found: Any, part: HeatMap, measure: Measure, title: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    axes, ramp = found.add_subplot(), ramp_of(measure)
    colours = LinearSegmentedColormap.from_list("day", DAY)
    norm: Any = None
    if ramp is not None:
        high = ramp.high if ramp.high > ramp.low else ramp.low * 1.001 + 1e-300
        norm = (LogNorm if ramp.scale == "log" else Normalize)(ramp.low, high)
    for row, values in enumerate(measure.values):
        for place, value in enumerate(values[:1] if outside(part, values) else values):
            _cell(axes, row, place, value, norm, colours, part)
            if part.written and value:
                _write(axes, row, _across(place, part), value, norm, colours, measure.unit)
    _labels(axes, part)
    lines = (title, f"{part.title}: {measure.name}")
    said = "\n".join(_short(line, 2 * LONGEST) for line in lines)
    axes.set_title(said, loc="left", fontsize=9, color=INK)
    if ramp is not None:
        bar = found.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.015, aspect=25)
        bar.set_ticks(
            [ramp.at(i / (TICKS - 1)) for i in range(TICKS)], labels=ticks_of(ramp, measure.unit)
        )
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)


def _cell(
    axes: Any, row: int, place: int, value: Value, norm: Any, colours: Any, part: HeatMap
) -> None:
    """Draw a cell; what is not there is hatched, zero has a dot, no number a mark."""
    from matplotlib.patches import Rectangle

    at = _across(place, part)
    odd = value is not None and not math.isfinite(value)
    face = PALE if odd or not value or norm is None else colours(norm(value))
    hatch = "/////" if value is None else None
    box = Rectangle((at, row), 0.94, 0.94, facecolor=face, hatch=hatch, edgecolor=HATCH, lw=0)
    axes.add_patch(box)
    mark = "!" if odd else "\u00b7" if value == 0 else ""
    if mark:
        axes.text(at + 0.47, row + 0.47, mark, ha="center", va="center", fontsize=7, color=INK)


def _write(
    axes: Any, row: int, at: float, value: float, norm: Any, colours: Any, unit: str
) -> None:
    """Write a cell's number in it, in the ink that can be read there."""
    from matplotlib.colors import to_hex

    ink = contrasting(to_hex(colours(norm(value)))) if norm is not None else INK
    text = figure(value, unit)
    axes.text(at + 0.47, row + 0.47, text, ha="center", va="center", fontsize=7, color=ink)


def _across(place: int, part: HeatMap) -> float:
    """Return where a column stands; the one that sums up stands apart."""
    return place + (0.5 if part.margin and place else 0.0)


def _labels(axes: Any, part: HeatMap) -> None:
    every = max(1, math.ceil(len(part.columns) / SHOWN))
    shown = [i for i in range(len(part.columns)) if (i - part.margin) % every == 0 or i == 0]
    axes.set_xlim(0, _across(len(part.columns), part))
    axes.set_ylim(len(part.rows), 0)
    axes.set_xticks([_across(i, part) + 0.47 for i in shown])
    axes.set_xticklabels([_short(part.columns[i]) for i in shown], fontsize=7)
    axes.set_yticks([i + 0.47 for i in range(len(part.rows))])
    axes.set_yticklabels([_short(name) for name in part.rows], fontsize=8)
    axes.set_xlabel(_short(part.column_axis), fontsize=8)
    axes.tick_params(length=0, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def _short(text: str, longest: int = LONGEST) -> str:
    """Return a label without what cannot be seen, its middle left out where it is long."""
    text = visible(text)
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2 - 1]}\u2026{text[-longest // 2 :]}"
