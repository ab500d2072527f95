"""How long merges take: against copying the files, and against mergekit 0.1.5 if it is there.

    python benchmarks/speed.py [--folder /dev/shm] [--pairs 5]

The floor of a merge is `cat` of its inputs and `cp` of a file of its output's size. Both are run in
turn, and the median of the ratios pair by pair is printed. MERGEKIT_PEER names a python that has
mergekit; without one those rows are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _peer
from _models import write_model

from mergekit_ft import merge

PLANS = {  # method: inputs besides the base, parameters of each
    "linear": (2, "weight: 0.5"),
    "task_arithmetic": (2, "weight: 0.5"),
    "ties": (2, "weight: 0.5, density: 0.2"),
}
BARS = {"linear": 1.5, "task_arithmetic": 2.0, "ties": 6.0}
PEER_PAIRS = 3
PEER_BARS = {"linear": (4.0, 10.0), "ties": (15.0, 20.0)}  # whole process, beyond start


def main() -> None:
    """Make the models, then print one row for each measurement."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    asked.add_argument("--pairs", type=int, default=5)
    asked = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        os.environ["MERGEKIT_FT_CACHE"] = str(Path(made) / "cache")
        models = [write_model(Path(made) / f"model{i}", i) for i in range(3)]
        size = sum(file.stat().st_size for file in models[0].glob("*.safetensors"))
        print(f"three bfloat16 models of {size / 1e6:.0f} MB each, {os.cpu_count()} cores")
        time.sleep(2.5)  # digests of files younger than 2 s are not remembered
        for method in PLANS:
            _against_copying(method, models, Path(made), asked.pairs)
        _start_up()
        if peer := _peer.python():
            for method in PEER_BARS:
                _against_peer(method, models, Path(made), peer)


def _plan(method: str, models: list[Path], folder: Path) -> Path:
    """Write the plan of a method over the models."""
    count, parameters = PLANS[method]
    base = f"base_model: {models[0]}\n" if method != "linear" else ""
    entries = "".join(
        f"  - model: {model}\n    parameters: {{{parameters}}}\n" for model in models[-count:]
    )
    path = folder / f"{method}.yaml"
    path.write_text(f"merge_method: {method}\n{base}models:\n{entries}dtype: bfloat16\n")
    return path


def _inputs(method: str, models: list[Path]) -> list[Path]:
    used = models[-PLANS[method][0] :] if method == "linear" else models
    return [file for model in used for file in model.glob("*.safetensors")]


def _against_copying(method: str, models: list[Path], folder: Path, pairs: int) -> None:
    """Print how many times the floor a merge takes; the first run hashes its inputs."""
    plan, inputs = _plan(method, models, folder), _inputs(method, models)
    out, copied = folder / "out", folder / "copied"

    def ours() -> float:
        shutil.rmtree(out, ignore_errors=True)
        return _seconds(lambda: merge(plan, out))

    def floor() -> float:
        copied.unlink(missing_ok=True)
        return _seconds(copy)

    def copy() -> None:
        subprocess.run(["cat", *map(str, inputs)], stdout=subprocess.DEVNULL, check=True)
        subprocess.run(["cp", str(inputs[0]), str(copied)], check=True)

    floor()
    shutil.rmtree(Path(os.environ["MERGEKIT_FT_CACHE"]), ignore_errors=True)
    first = ours() / floor()
    warm = [ours() / floor() for _ in range(pairs)]
    print(
        f"{method:16s} {statistics.median(warm):5.2f} x copying "
        f"(min {min(warm):.2f}, max {max(warm):.2f}; bar {BARS[method]}; "
        f"{first:.2f} when the inputs have never been hashed)"
    )
    shutil.rmtree(out)


def _start_up() -> None:
    """Print the time of `mergekit-ft methods`, whole process."""
    command = [sys.executable, "-m", "mergekit_ft", "methods"]
    runs = [
        _seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in "12345"
    ]
    print(f"mergekit-ft methods: {statistics.median(runs):.2f} s (bar 0.3 s)")


def _against_peer(method: str, models: list[Path], folder: Path, peer: str) -> None:
    """Print how many times longer mergekit takes, as a process and beyond its start."""
    plan, out = _plan(method, models, folder), folder / "out"
    command = [sys.executable, "-m", "mergekit_ft", "merge", str(plan), str(out), "--quiet"]
    whole, beyond = [], []
    for _ in range(PEER_PAIRS):
        ours = _seconds(lambda: subprocess.run(command, check=True))
        shutil.rmtree(out)
        whole.append(_peer.whole_process(peer, plan, folder) / ours)
        ours = _seconds(lambda: merge(plan, out))
        shutil.rmtree(out)
        beyond.append(_peer.beyond_start(peer, plan, folder) / ours)
    bars = PEER_BARS[method]
    print(
        f"{method:16s} mergekit-yaml takes {statistics.median(whole):5.1f} x as a process "
        f"(bar {bars[0]}), {statistics.median(beyond):5.1f} x beyond start and imports "
        f"(bar {bars[1]})"
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
