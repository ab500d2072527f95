"""Show the figures of all checkpoints as a table, as JSON and as a picture."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from examples.two_experts.evaluate import Scores
from examples.two_experts.items import TASKS

Figures = dict[str, Scores]  # by the name of the checkpoint, in the order of the story
COLOURS = {"orders": "#1f6f8b", "triage": "#e07a3f"}
GREY = "#6b6b6b"


def table(figures: Figures) -> str:
    """Lay the figures out in columns."""
    heads = [f"{task} {what}" for task in TASKS for what in ("loss", "exact")]
    width = max(len(name) for name in figures)
    lines = ["  ".join([" " * width, *heads, "neutral loss"])]
    for name, scores in figures.items():
        cells = [name.ljust(width)]
        for task in TASKS:
            cells.append(f"{scores.tasks[task].loss:.3f}".rjust(len(task) + 5))
            cells.append(f"{scores.tasks[task].exact:.1%}".rjust(len(task) + 6))
        lines.append("  ".join([*cells, f"{scores.neutral_loss:.3f}".rjust(12)]))
    return "\n".join(lines)


def write_json(figures: Figures, file: Path) -> None:
    """Write every figure, unrounded."""
    plain = {name: asdict(scores) for name, scores in figures.items()}
    file.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def draw(figures: Figures, title: str, file: Path) -> None:
    """Draw exact match, loss on the answers and loss on neutral text side by side."""
    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        picture, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
        _exact(axes[0], figures)
        _losses(axes[1], figures)
        _neutral(axes[2], figures)
        axes[0].set_yticks(range(len(figures)), list(figures))
        axes[0].invert_yaxis()
        picture.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        handles, labels = axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="upper right", ncols=2, frameon=False)
        picture.savefig(file, dpi=160)
        plt.close(picture)


def _exact(axes: Axes, figures: Figures) -> None:
    for place, task in enumerate(TASKS):
        shares = [100 * scores.tasks[task].exact for scores in figures.values()]
        rows = [row + 0.38 * (place - 0.5) for row in range(len(figures))]
        bars = axes.barh(rows, shares, height=0.36, color=COLOURS[task], label=task)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7.5, color=GREY)
    axes.set(xlim=(0, 112), title="exact answers, %")
    axes.set_xticks(range(0, 101, 25))


def _losses(axes: Axes, figures: Figures) -> None:
    for task in TASKS:
        losses = [scores.tasks[task].loss for scores in figures.values()]
        axes.plot(losses, range(len(figures)), "o", color=COLOURS[task], markersize=6)
    axes.set(xscale="log", title="loss on the answers, nats a token")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#e6e6e6")


def _neutral(axes: Axes, figures: Figures) -> None:
    losses = [scores.neutral_loss for scores in figures.values()]
    axes.plot(losses, range(len(figures)), "o", color=GREY, markersize=6)
    axes.axvline(losses[0], color=GREY, linewidth=0.8, linestyle=":")
    axes.set(title="loss on neutral text, nats a token")
    axes.grid(axis="y", color="#e6e6e6")
