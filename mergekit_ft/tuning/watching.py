"""Who watches a training: a bar or lines, curves, and when it is time for a checkpoint."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mergekit_ft.tuning.company import Company

CURVES = "curves.json"
LEAST, TIMES = 60.0, 20.0  # seconds between checkpoints, and by how long one takes to write


class Paced(TrainerCallback):
    """Asks for checkpoints by what they cost: after the first, at most a twentieth of the time.

    One is due a minute after the last, and not before twenty times as long has passed as that
    took. None is written after the last step, which the phase's own end follows.
    """

    def __init__(self, company: Company) -> None:
        self.company = company
        self.cost, self.since, self.asked = 0.0, time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask, by the clock of the process that writes, so that all do the same."""
        self.asked = time.monotonic()
        due = self.company.leads and self.asked - self.since >= max(LEAST, TIMES * self.cost)
        if self.company.summed(int(due)) and state.global_step < state.max_steps:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the evaluation, which comes before the writing, out of what that costs."""
        self.asked = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take how long it took."""
        self.since = time.monotonic()
        self.cost = self.since - self.asked


class Curves(TrainerCallback):
    """Keeps what is logged, and shows it."""

    def __init__(self, phase: int, phases: int, show: str) -> None:
        self.phase, self.phases, self.show = phase, phases, show  # "lines", "json", "nothing"
        self.entries: list[dict[str, Any]] = []

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave what was measured with the checkpoint, as the last of its files."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / CURVES).write_text(json.dumps(self.entries))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take what was measured at a step."""
        kept = ("loss", "eval_loss", "grad_norm", "learning_rate")
        found = {key: float(value) for key, value in (logs or {}).items() if key in kept}
        if not found:
            return
        entry = {"phase": self.phase + 1, "step": state.global_step, **found}
        self.entries.append(entry)
        if self.show == "json":
            print(json.dumps(entry), file=sys.stderr, flush=True)  # noqa: T201
        elif self.show == "lines":
            print(self._line(entry, state.max_steps), file=sys.stderr, flush=True)  # noqa: T201

    def _line(self, entry: dict[str, Any], steps: int) -> str:
        where = f"step {entry['step']} of {steps}"
        if self.phases > 1:
            where = f"phase {self.phase + 1} of {self.phases}, {where}"
        names = {"loss": "loss", "eval_loss": "validation loss"}
        told = [f"{word} {entry[key]:.4f}" for key, word in names.items() if key in entry]
        return f"{where}: {', '.join(told)}"


def write_curves(entries: list[dict[str, Any]], folder: Path) -> list[str]:
    """Write curves.json, and curves.png where matplotlib is installed; return their names."""
    (folder / CURVES).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [CURVES]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    last = 0
    starts = []
    for phase in sorted({entry["phase"] for entry in entries}):
        mine = [entry for entry in entries if entry["phase"] == phase]
        starts.append(last)
        for key, style, word in (("loss", "-", "training"), ("eval_loss", "o--", "validation")):
            points = [(last + e["step"], e[key]) for e in mine if key in e]
            if points:
                label = word if phase == mine[0]["phase"] and phase == 1 else None
                colour = {"loss": "#1b6ca8", "eval_loss": "#c8553d"}[key]
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
        last += max((entry["step"] for entry in mine), default=0)
    for start in starts[1:]:
        axes.axvline(start, color="0.7", linewidth=1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "curves.png", dpi=150)
    return [CURVES, "curves.png"]
