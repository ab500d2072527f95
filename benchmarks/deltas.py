"""How long `delta extract` takes to find the k largest changes, and in what memory; are they?

    python benchmarks/deltas.py [BASE TUNED] [--density 0.01] [--pairs 9] [--folder /dev/shm]

Two folders, or two random bfloat16 models of 0.14e9 parameters. The floor is `cat` of both into
/dev/null, warm; the median of the ratios pair by pair is printed, and the time that python takes to
read both files into memory. What was kept is compared with a selection in float64 by numpy. Memory
(Linux only) is anonymous, at its peak, beyond the interpreter with torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _anonymous
import numpy as np
import torch
from _models import write_model

from mergekit_ft.deltas.compose import compose
from mergekit_ft.deltas.extract import Extracted, extract
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import open_delta

LAYERS = 7  # of the random models
BAR = 3.0
BUDGETS = (64, 256)  # MiB
START = "import torch, mergekit_ft.deltas.extract"


def main() -> None:
    """Print one row for each measurement."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("models", nargs="*", type=Path)
    asked.add_argument("--density", type=float, default=0.01)
    asked.add_argument("--pairs", type=int, default=9)
    asked.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    asked = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        here = Path(made)
        models = asked.models or [write_model(here / f"m{i}", i, LAYERS) for i in range(2)]
        found = extract(*map(str, models), here / "d.safetensors", density=asked.density)
        share = found.entries / found.considered
        print(
            f"{found.entries:,} of {found.considered:,} entries ({share:.3%}), "
            f"{found.nbytes / 1e6:.1f} MB, {os.cpu_count()} cores"
        )
        _check(models, found, int(asked.density * found.considered))
        _time(models, here, asked.density, asked.pairs)
        _memory(models, here, asked.density)


def _check(models: list[Path], found: Extracted, k: int) -> None:
    """Compare what was kept with the k largest in float64, of equal ones the first."""
    with open_source(str(models[0])) as base, open_source(str(models[1])) as tuned:
        sizes = np.concatenate([_changes(base, tuned, name) for name in base])
        kept = np.zeros(len(sizes), np.bool_)
        delta, first = open_delta(found.out), 0
        for name, info in base.items():
            if name in delta.changes:
                places, _ = Entries(delta, delta.changes[name]).within(0, info.numel)
                kept[places.numpy() + first] = True
            first += info.numel
    threshold = np.partition(sizes, len(sizes) - k)[len(sizes) - k]
    wanted = sizes > threshold
    equal = np.flatnonzero(sizes == threshold)
    wanted[equal[: k - np.count_nonzero(wanted)]] = True
    print(
        f"kept {np.count_nonzero(kept):,}, wanted {k:,}; they are "
        f"{'the same' if np.array_equal(kept, wanted) else 'NOT the same'} as float64 has them "
        f"({len(equal):,} entries equal the k-th largest)"
    )


def _changes(base: Source, tuned: Source, name: str) -> np.ndarray:
    both = (tuned.tensor(name).double(), base.tensor(name).double())
    return torch.sub(*both).abs_().flatten().numpy()


def _time(models: list[Path], here: Path, density: float, pairs: int) -> None:
    """Print how many times the floor it takes: within a process, and as one."""
    files = [str(file) for model in models for file in sorted(model.glob("*.safetensors"))]
    words = ["delta", "extract", *map(str, models), str(here / "p.safetensors"), "--overwrite"]
    command = [sys.executable, "-m", "mergekit_ft", *words, "--density", str(density), "--quiet"]

    def floor() -> float:
        return _seconds(lambda: subprocess.run(["cat", *files], stdout=subprocess.DEVNULL))

    def ours(**asked: object) -> float:
        out = here / "t.safetensors"
        return _seconds(lambda: extract(*map(str, models), out, overwrite=True, **asked))

    floor(), ours(density=density)
    for what, asked in (("the largest", {"density": density}), ("all that differs", {})):
        runs = [(ours(**asked), floor()) for _ in range(pairs)]
        ratios = [mine / copying for mine, copying in runs]
        print(
            f"{what}: {statistics.median(mine for mine, _ in runs):.3f} s, reading both "
            f"{statistics.median(copying for _, copying in runs):.3f} s: "
            f"{statistics.median(ratios):.2f} x (min {min(ratios):.2f}, max {max(ratios):.2f}; "
            f"bar {BAR})"
        )
    memory = statistics.median(_seconds(lambda: _read(files)) for _ in range(pairs))
    print(f"reading both into memory, in python: {memory:.3f} s")
    start = statistics.median(_seconds(lambda: _run([sys.executable, "-c", START])) for _ in "123")
    whole = statistics.median(_seconds(lambda: _run(command)) for _ in "123")
    print(f"as a process {whole:.2f} s, of which {start:.2f} s to start python with torch")
    terms = [(here / "d.safetensors", 0.5), (here / "p.safetensors", 1.0)]
    extract(*map(str, models), terms[1][0], overwrite=True, density=density, scope="tensor")
    seconds = _seconds(lambda: compose(terms, here / "sum.safetensors"))
    print(f"composing two such deltas: {seconds:.2f} s")


def _memory(models: list[Path], here: Path, density: float) -> None:
    bare = _anonymous.bare()
    words = ["delta", "extract", *map(str, models), str(here / "m.safetensors"), "--overwrite"]
    command = [sys.executable, "-m", "mergekit_ft", *words, "--density", str(density), "--quiet"]
    for budget in BUDGETS:
        peak = _anonymous.peak([*command, "--memory", f"{budget}MiB"]) - bare
        print(f"--memory {budget}MiB: {peak:.0f} MiB beyond the {bare:.0f} of python with torch")


def _read(files: list[str]) -> None:
    for file in files:
        Path(file).read_bytes()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
