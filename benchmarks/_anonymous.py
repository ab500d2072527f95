"""Anonymous memory of processes, in MiB, from Linux's /proc.

Pages of the page cache and of shared memory do not count.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BARE = "import torch, yaml, pydantic, click, tqdm; torch.zeros(1) + 1"


def bare(text: str = BARE) -> float:
    """Return what a python holds that has imported what a merge imports, or has run a text."""
    waits = f"{text}\nprint('there', flush=True)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    while process.stdout.readline() not in (b"there\n", b""):
        pass
    peak = _now(process.pid)
    process.communicate(b"\n")
    return peak


def peak(command: list[str]) -> float:
    """Run a command to its end and return its peak, sampled every 2 ms."""
    process = subprocess.Popen(command)
    most = 0.0
    while process.poll() is None:
        most = max(most, _now(process.pid))
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the merge failed with exit code {process.returncode}")
    return most


def _now(pid: int) -> float:
    """Return what a process has; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line for line in lines if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) / 1024 if found else 0.0
