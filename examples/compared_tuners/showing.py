"""Show what was compared as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, GREY = "#1f6f8b", "#6b6b6b"


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay the figures out in Markdown: both seeds in a cell."""
    lines = [
        "| way | learning rate | weights that train | held-out loss | exact | neutral perplexity |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in figures.items():
        rate = f"{found['learning_rate']:.0e}" if "learning_rate" in found else ""
        share = f"{found['trained_share']:.1%}"
        cells = [name, rate, share, *(_both(found, *asked) for asked in SHOWN)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = (("loss", ".3f"), ("exact", ".1%"), ("perplexity", ".1f"))


def _both(found: Mapping[str, Any], figure: str, form: str) -> str:
    return ", ".join(f"{seed[figure]:{form}}" for seed in found["seeds"].values())


def draw(figures: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw what was learned against what was forgotten, a point a seed."""
    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        picture, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for name, found in figures.items():
            seeds = list(found["seeds"].values())
            exact = [100 * seed["exact"] for seed in seeds]
            neutral = [seed["perplexity"] for seed in seeds]
            if name == "base":  # a level: what is above it was forgotten
                axes.axhline(neutral[0], color=GREY, linewidth=0.6, linestyle="--")
                left: Any = ("axes fraction", "data")
                beside = {"xycoords": left, "textcoords": "offset points", "color": GREY}
                axes.annotate(name, (0.35, neutral[0]), (0, 3), **beside)
                continue
            axes.plot(exact, neutral, "o-", color=BLUE, markersize=4, linewidth=0.6)
            axes.annotate(name, (exact[0], neutral[0]), (4, 3), textcoords="offset points")
        axes.set_xlabel("exact answers on held-out rows, %")
        axes.set_ylabel("perplexity of neutral text")
        axes.set_title("What was learned, and what it cost; a line joins two seeds")
        picture.savefig(file, dpi=160)
        plt.close(picture)
