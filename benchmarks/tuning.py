"""What tuning holds in memory: the peak of sparse tuners at 5 % against full AdamW, in one run.

    python benchmarks/tuning.py BASE ROWS [--steps 4]

BASE is a checkpoint, ROWS a JSONL file. Memory is anonymous, at its peak, beyond the interpreter
with torch (Linux only): weights, gradients, optimizer state, activations, and whatever loading and
writing take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _anonymous

from mergekit_ft.tuning.phases import START

BAR = 0.6  # of full AdamW's peak
TUNERS: dict[str, Any] = {
    "full": "full",
    "lift": {"lift": {"rank": 14, "filter_rank": 14, "interval": 1000}},
    "sara": {"sara": {"density": 0.05}},
    "s2ft": {"s2ft": {"d_ratio": 0.25}},
    "hft": "hft",
}


def main() -> None:
    """Print each tuner's peak and its ratio to full tuning's."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("base", type=Path)
    asked.add_argument("rows", type=Path)
    asked.add_argument("--steps", type=int, default=4)
    given = asked.parse_args()
    bare = _anonymous.bare()
    print(f"interpreter with torch: {bare:.0f} MiB anonymous")
    full = 0.0
    for name, tuner in TUNERS.items():
        with tempfile.TemporaryDirectory() as folder:
            peak = _peak(given.base, given.rows, tuner, given.steps, Path(folder)) - bare
        full = full or peak
        print(f"{name:6s} {peak:7.0f} MiB beyond that, {peak / full:.2f} x full (bar {BAR})")
    with tempfile.TemporaryDirectory() as folder:
        peak = _second_phase(given.base, given.rows, given.steps, Path(folder)) - bare
    print(f"lt_sft, phase 2, {peak:7.0f} MiB beyond that, {peak / full:.2f} x full (bar {BAR})")


def _peak(base: Path, rows: Path, tuner: Any, steps: int, folder: Path) -> float:
    """Tune as a user would and return the peak in MiB."""
    return _anonymous.peak(_command(base, rows, tuner, steps, folder))


def _second_phase(base: Path, rows: Path, steps: int, folder: Path) -> float:
    """Stop a run of lt_sft where its second phase begins; return the peak of what goes on."""
    command = _command(base, rows, {"lt_sft": {"density": 0.05}}, steps, folder)
    begun = folder / "out.work" / "phase-2" / START
    run = subprocess.Popen(command)
    while not begun.exists():
        if run.poll() is not None:
            raise SystemExit("the run ended before its second phase")
        time.sleep(0.01)
    run.kill()
    run.wait()
    return _anonymous.peak([*command, "--resume"])


def _command(base: Path, rows: Path, tuner: Any, steps: int, folder: Path) -> list[str]:
    """Write a plan, and return what tunes by it."""
    plan = {
        "base": str(base),
        "data": {"train": str(rows), "rows": "raw", "max_length": 128},
        "tuner": tuner,
        "output": "full",
        "training": {"steps": steps, "batch": 2, "save_every": 10 * steps, "seed": 0},
    }
    (folder / "plan.yaml").write_text(json.dumps(plan))
    out = str(folder / "out")
    return [sys.executable, "-m", "mergekit_ft", "tune", str(folder / "plan.yaml"), out, "--quiet"]


if __name__ == "__main__":
    main()
