"""What every method costs: time against copying the files and against mergekit 0.1.5; memory.

    python benchmarks/methods.py [METHOD ...] [--folder /dev/shm] [--pairs 3] [--layers 22]

The floor of a merge is `cat` of its inputs and `cp` of a file of its output's size. Both are run in
turn, and the median of the ratios pair by pair is printed. Inputs have been hashed before. Where a
python has mergekit (MERGEKIT_PEER names one), its time beyond start and imports is compared with
ours. Memory is anonymous, at its peak, beyond the interpreter with torch (Linux only).
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
from typing import NamedTuple

import _anonymous
import _peer
from _models import write_model

from mergekit_ft import merge, registry

MEMORY = 256  # MiB
ELEMENTS, MAGNITUDES = 3.0, 8.0  # bars: times the floor


class Row(NamedTuple):
    """One method, as it is measured."""

    own: str = ""  # parameters of each model
    shared: str = ""
    bar: float | None = ELEMENTS
    tuned: int = 2  # models besides the base
    base: bool = True
    peer: bool = True  # whether mergekit has it


ROWS = {
    "linear": Row("weight: 0.5", base=False),
    "slerp": Row(shared="t: 0.3", tuned=1),
    "nuslerp": Row("weight: 0.5"),
    "multislerp": Row("weight: 0.5"),
    "karcher": Row(base=False, bar=None),  # iterates
    "task_arithmetic": Row("weight: 0.5"),
    "ties": Row("weight: 0.5, density: 0.2", bar=MAGNITUDES),
    "dare_linear": Row("weight: 0.5, density: 0.5"),
    "dare_ties": Row("weight: 0.5, density: 0.5"),
    "della": Row("weight: 0.5, density: 0.7, epsilon: 0.1", bar=None),  # ranks every row
    "della_linear": Row("weight: 0.5, density: 0.7, epsilon: 0.1", bar=None),
    "breadcrumbs": Row("weight: 0.5, density: 0.2, gamma: 0.01", bar=MAGNITUDES),
    "breadcrumbs_ties": Row("weight: 0.5, density: 0.2, gamma: 0.01", bar=MAGNITUDES),
    "model_stock": Row(),
    "nearswap": Row(shared="t: 0.001", tuned=1),
    "intruder_scaling": Row(tuned=1, bar=None, peer=False),  # decomposes every matrix
    "sparse_compose": Row("weight: 0.5", peer=False),
    "consensus": Row("threshold: 0.4", "k: 2", peer=False),
    "sce": Row(shared="select_topk: 0.1", bar=MAGNITUDES),
    "arcee_fusion": Row(tuned=1, bar=MAGNITUDES),
    "ram": Row(shared="epsilon: 0.001"),
    "ramplus_tl": Row(shared="epsilon: 0.001"),
    "passthrough": Row("scale: 0.9", tuned=1, base=False),
    "lines": Row(shared="gamma: 0.3", tuned=1, peer=False),
}


def main() -> None:
    """Make the models, then print a row for each method."""
    asked = _arguments()
    names = asked.methods or registry.names("operator")
    if unmeasured := set(names) - set(ROWS):
        raise SystemExit(f"benchmarks/methods.py has no row for {', '.join(sorted(unmeasured))}")
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        folder = Path(made)
        os.environ["MERGEKIT_FT_CACHE"] = str(folder / "cache")
        models = [write_model(folder / f"model{i}", i, asked.layers) for i in range(3)]
        size = sum(file.stat().st_size for file in models[0].glob("*.safetensors"))
        print(f"three bfloat16 models of {size / 1e6:.0f} MB each, {os.cpu_count()} cores")
        time.sleep(2.5)  # digests of files younger than 2 s are not remembered
        bare, peer = _anonymous.bare(), _peer.python()
        for name in names:
            print(_measured(name, models, folder, asked.pairs, bare, peer), flush=True)


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("methods", nargs="*", metavar="METHOD", help="all where none is named")
    asked.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    asked.add_argument("--pairs", type=int, default=3)
    asked.add_argument("--layers", type=int, default=22)
    return asked.parse_args()


def _measured(
    name: str, models: list[Path], folder: Path, pairs: int, bare: float, peer: str | None
) -> str:
    """Measure one method and return its row."""
    row, out = ROWS[name], folder / "out"
    plan, inputs = _plan(name, models, folder), _inputs(row, models)
    _seconds(lambda: merge(plan, out))  # hashes its inputs
    ours, ratios = [], []
    for _ in range(pairs):
        shutil.rmtree(out)
        ours.append(_seconds(lambda: merge(plan, out)))
        ratios.append(ours[-1] / _seconds(lambda: _copy(inputs, folder / "copied")))
    median = statistics.median(ratios)
    bar = f"bar {row.bar:g}{', MISSED' if median > row.bar else ''}" if row.bar else "no bar"
    said = (
        f"{name:16s} {median:6.2f} x copying (min {min(ratios):.2f}, max {max(ratios):.2f}; {bar})"
    )
    command = [sys.executable, "-m", "mergekit_ft", "merge", str(plan), str(out)]
    command += ["--memory", f"{MEMORY}MiB", "--overwrite", "--quiet"]
    peak = _anonymous.peak(command) - bare
    said += f"; {peak:4.0f} of {MEMORY} MiB{', MISSED' if peak > MEMORY else ''}"
    shutil.rmtree(out)
    if peer and row.peer:
        theirs = _peer.beyond_start(peer, plan, folder)
        said += f"; mergekit {theirs / statistics.median(ours):.1f} x as long"
    return said


def _plan(name: str, models: list[Path], folder: Path) -> Path:
    """Write the plan of a method over the models."""
    row = ROWS[name]
    lines = [f"merge_method: {name}", "dtype: bfloat16", "models:"]
    for model in models[1 : 1 + row.tuned]:
        lines.append(f"  - model: {model}")
        lines += [f"    parameters: {{{row.own}}}"] if row.own else []
    lines += [f"base_model: {models[0]}"] if row.base else []
    lines += [f"parameters: {{{row.shared}}}"] if row.shared else []
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _inputs(row: Row, models: list[Path]) -> list[Path]:
    used = models[0 if row.base else 1 : 1 + row.tuned]
    return [file for model in used for file in model.glob("*.safetensors")]


def _copy(inputs: list[Path], copied: Path) -> None:
    """Read the inputs, and write as much as an output holds."""
    subprocess.run(["cat", *map(str, inputs)], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["cp", str(inputs[0]), str(copied)], check=True)
    copied.unlink()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
