"""mergekit 0.1.5 timed from within, if a python that has it is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

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


def python() -> str | None:
    """Return a python that has mergekit: MERGEKIT_PEER, else the one in .venv-peer."""
    here = Path(__file__).resolve().parent.parent / ".venv-peer" / "bin" / "python"
    named = os.environ.get("MERGEKIT_PEER", str(here))
    return named if Path(named).exists() else None


def beyond_start(peer: str, plan: Path, folder: Path) -> float:
    """Return the seconds of one merge by mergekit, its start and imports apart."""
    script, out = folder / "peer.py", folder / "peer"
    script.write_text(TIMER)
    command = [peer, str(script), str(plan), str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(out)
    return float(said.split("SECONDS")[1])


def whole_process(peer: str, plan: Path, folder: Path) -> float:
    """Return the seconds of mergekit's own command, `mergekit-yaml`, for one merge."""
    out = folder / "peer"
    command = [str(Path(peer).with_name("mergekit-yaml")), str(plan), str(out), "--quiet"]
    began = time.perf_counter()
    subprocess.run([*command, "--no-write-model-card"], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds
