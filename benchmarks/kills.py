"""What a SIGKILL at a random moment leaves: never OUT, and --resume ends at the same bytes.

    python benchmarks/kills.py [--kills 20] [--seed 0]

Then the same plan under budgets of 64 MiB and 2 GiB, 1 and 4 threads and two PYTHONHASHSEEDs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _models import write_model


def main() -> None:
    """Kill, resume, compare; exit 1 if anything differs."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--kills", type=int, default=20)
    asked.add_argument("--seed", type=int, default=0)
    asked = asked.parse_args()
    moments = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as made:
        plan, out = _plan(Path(made)), Path(made) / "out"
        began = time.perf_counter()
        _merge(plan, out).wait()
        whole, right = time.perf_counter() - began, _digest(out)
        shutil.rmtree(out)
        visible = differing = resumed = 0
        for _ in range(asked.kills):
            resumed += _kill_and_resume(plan, out, moments.uniform(0.3, 1.0) * whole)
            visible += out.with_name("seen").exists()
            differing += _digest(out) != right
            shutil.rmtree(out)
        print(
            f"{asked.kills} kills ({resumed} with work to go on from): {visible} visible OUTs, "
            f"{differing} results that differ"
        )
        others = [_under(plan, out, *setting) != right for setting in _settings()]
        print(f"{len(others)} budgets, threads and hash seeds: {sum(others)} results that differ")
        raise SystemExit(bool(visible or differing or any(others)))


def _plan(folder: Path) -> Path:
    models = [write_model(folder / f"model{i}", i, layers=4) for i in range(3)]
    plan = folder / "plan.yaml"
    entries = "".join(f"  - model: {m}\n    parameters: {{weight: 0.5}}\n" for m in models[1:])
    plan.write_text(
        f"merge_method: dare_ties\nbase_model: {models[0]}\nmodels:\n{entries}"
        "parameters: {density: 0.4}\nthen: [{lines: {alpha: auto, beta: 0.5}}]\n"
    )
    return plan


def _merge(plan: Path, out: Path, *more: str, hash_seed: str = "random") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mergekit_ft", "merge", str(plan), str(out), "--quiet", *more]
    return subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": hash_seed})


def _kill_and_resume(plan: Path, out: Path, moment: float) -> bool:
    """Return whether the killed run left work to go on from."""
    process = _merge(plan, out)
    time.sleep(moment)
    process.kill()
    finished = process.wait() == 0
    if out.exists() and not (out / "mergekit_ft.lock.json").exists():
        out.with_name("seen").touch()
    left = out.with_name(out.name + ".part").exists()
    if (not finished or not out.exists()) and _merge(plan, out, "--resume").wait():
        raise SystemExit("the resumed run failed")
    return left


def _settings() -> list[tuple[str, str, str]]:
    return [("64MiB", "1", "1"), ("2GiB", "1", "2"), ("64MiB", "4", "1"), ("2GiB", "4", "2")]


def _under(plan: Path, out: Path, memory: str, threads: str, hash_seed: str) -> str:
    """Return the digest of the weights under a setting."""
    _merge(plan, out, "--memory", memory, "--threads", threads, hash_seed=hash_seed).wait()
    digest = _digest(out)
    shutil.rmtree(out)
    return digest


def _digest(out: Path) -> str:
    """Return the SHA-256 of the output's weights, one after the other."""
    sha = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        sha.update(file.read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    main()
