"""Fine-tune the base on one task with `mergekit-ft tune`: loss on the answers only."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.two_experts.items import rows_of

PLAN = "mergekit_ft.tune.yaml"  # what `tune` leaves beside the weights


def finetune(task: str, plan: Path, out: Path, say: Callable[[str], None]) -> bool:
    """Write an expert to `out`; give False where it is there already, made from the same things."""
    rows, new = rows_of(task, "train"), out.with_name(f"{task}.rows.jsonl")
    same = new.exists() and new.read_text(encoding="utf-8") == rows
    made = out / PLAN
    if same and made.exists() and made.read_text(encoding="utf-8") == plan.read_text("utf-8"):
        return False
    new.write_text(rows, encoding="utf-8")
    arguments = ["tune", str(plan), str(out), "--overwrite"]
    say(f"mergekit-ft {' '.join(arguments)}")
    if subprocess.run([sys.executable, "-m", "mergekit_ft", *arguments]).returncode:
        raise SystemExit(f"Tuning by {plan} failed; the lines above say why.")
    return True
