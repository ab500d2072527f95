"""How much memory a merge takes: anonymous, at its peak, beyond the interpreter with torch.

    python benchmarks/memory.py [--folder /dev/shm]

Linux only: the peak is of RssAnon in /proc, sampled every 2 ms; pages of the page cache and of
shared memory do not count. Rows: one 2 GiB tensor under --memory 256MiB; then the same model with
4 times the layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import _anonymous
import torch
from _models import write_model
from safetensors.torch import save_file

BUDGET = 256  # MiB


def main() -> None:
    """Print the peak of each merge."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    with tempfile.TemporaryDirectory(dir=asked.parse_args().folder) as made:
        bare = _anonymous.bare()
        print(f"interpreter with torch: {bare:.0f} MiB anonymous")
        giant = [_giant(Path(made) / f"giant{i}", i) for i in range(2)]
        for method in ("task_arithmetic", "ties"):
            peak = _peak_of_merge(method, giant, Path(made)) - bare
            print(f"{method:16s} one 2 GiB tensor: {peak:.0f} MiB beyond that (bar {BUDGET})")
        for model in giant:
            (model / "model.safetensors").unlink()
        peaks = []
        for layers in (6, 24):
            models = [write_model(Path(made) / f"m{layers}-{i}", i, layers) for i in range(2)]
            peaks.append(_peak_of_merge("ties", models, Path(made)) - bare)
        ratio = peaks[1] / peaks[0]
        print(f"4 x the layers: {peaks[0]:.0f} -> {peaks[1]:.0f} MiB, {ratio:.2f} x (flat: 1)")


def _giant(folder: Path, seed: int) -> Path:
    """Write a checkpoint that has one tensor of 2 GiB."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    giant = torch.empty(2**20, 2**10, dtype=torch.bfloat16)
    for rows in giant.split(2**14):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    save_file({"embed.weight": giant, "norm.weight": torch.ones(8)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _peak_of_merge(method: str, models: list[Path], folder: Path) -> float:
    """Merge as a user would and return the peak in MiB."""
    plan = folder / "plan.yaml"
    density = ", density: 0.2" if method == "ties" else ""
    plan.write_text(
        f"merge_method: {method}\nbase_model: {models[0]}\nmodels:\n"
        f"  - model: {models[1]}\n    parameters: {{weight: 0.5{density}}}\n"
    )
    command = [sys.executable, "-m", "mergekit_ft", "merge", str(plan), str(folder / "out")]
    command += ["--memory", f"{BUDGET}MiB", "--overwrite", "--quiet"]
    return _anonymous.peak(command)


if __name__ == "__main__":
    main()
