"""mergekit 0.1.5 timed from within, if a python that has it is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

TIMER = """
import sys, time, yaml, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
began = time.perf_counter()
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
run_merge(config, out_path=sys.argv[2], options=MergeOptions(write_model_card=False, quiet=True))
print("SECONDS", time.perf_counter() - began)
"""


class Seconds(NamedTuple):
    """How long one merge took."""

    whole: float  # the process
    beyond: float  # start and imports


def python() -> str | None:
    """Return a python that has mergekit: MERGEKIT_PEER, else the one in .venv-peer."""
    here = Path(__file__).resolve().parent.parent / ".venv-peer" / "bin" / "python"
    named = os.environ.get("MERGEKIT_PEER", str(here))
    return named if Path(named).exists() else None


def timed(peer: str, plan: Path, folder: Path) -> Seconds:
    """Merge once by mergekit, in a process of its own, and throw the result away."""
    script, out = folder / "peer.py", folder / "peer"
    script.write_text(TIMER)
    began = time.perf_counter()
    command = [peer, str(script), str(plan), str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    whole = time.perf_counter() - began
    shutil.rmtree(out)
    return Seconds(whole, float(said.split("SECONDS")[1]))
