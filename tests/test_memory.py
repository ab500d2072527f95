"""Anonymous memory of a merge, sampled from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_checkpoint

MIB = 1 << 20
SLACK = 4  # MiB: stacks and heaps of the threads, the chunks that are hashed
BARE = """
import torch, mergekit_ft.engine, mergekit_ft.methods.task_arithmetic, mergekit_ft.methods.ties
torch.empty(1).add_(1)
print("ready", flush=True)
input()
"""
MERGE = """
from mergekit_ft.engine import merge
merge("plan.yaml", "out", memory={memory}, threads=2)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RssAnon stands in Linux' /proc")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(count: int, numel: int) -> None:
    """Write base and tuned with so many tensors in bfloat16."""
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        tensor = torch.full((numel,), value, dtype=torch.bfloat16)
        made = {f"model.layers.{i}.mlp.up_proj.weight": tensor for i in range(count)}
        write_checkpoint(Path(name), made)


def plan(method: str, parameters: str) -> None:
    Path("plan.yaml").write_text(
        f"merge_method: {method}\nbase_model: ./base\n"
        f"models:\n  - {{model: ./tuned, parameters: {{{parameters}}}}}\n"
    )


def anonymous(process: subprocess.Popen[bytes]) -> float:
    """Return the MiB of memory that no file stands behind; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) / 1024 if found else 0.0


def peak(memory: int) -> float:
    """Return the highest MiB seen while a merge runs."""
    run = subprocess.Popen([sys.executable, "-c", MERGE.format(memory=memory)])
    highest = 0.0
    while run.poll() is None:
        highest = max(highest, anonymous(run))
        time.sleep(0.005)
    assert run.returncode == 0
    assert Path("out").exists()
    return highest


@pytest.fixture(scope="module")
def bare() -> float:
    """Return the MiB of an interpreter that imported everything and does nothing."""
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", BARE], stdin=pipe, stdout=pipe)
    assert run.stdout is not None and run.stdout.readline() == b"ready\n"
    found = anonymous(run)
    run.communicate(b"\n")
    return found


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", "weight: 0.5"),
        ("ties", "weight: 0.5, density: 0.3"),
        ("dare_linear", "weight: 0.5, density: 0.3"),
    ],
)
def test_a_tensor_of_256_mib_is_merged_within_32(method: str, parameters: str, bare: float) -> None:
    write(1, 128 * MIB)
    plan(method, parameters)
    used = peak(32 * MIB) - bare
    assert used < 32 + SLACK, f"{used:.0f} MiB"


def test_what_is_kept_of_every_block_does_not_hold_freed_memory_apart(bare: float) -> None:
    write(1, 128 * MIB)
    models = "  - model: ./base\n  - model: ./tuned\n"
    Path("plan.yaml").write_text(f"merge_method: karcher\nmodels:\n{models}")
    used = peak(32 * MIB) - bare
    assert used < 32 + SLACK, f"{used:.0f} MiB"


def test_what_a_selection_keeps_of_ordinary_values_is_within_the_budget_too(bare: float) -> None:
    for seed, name in enumerate(("base", "tuned")):
        rolls = torch.Generator().manual_seed(seed)
        made = {
            f"model.layers.{i}.mlp.up_proj.weight": torch.randn(
                48 * MIB, generator=rolls
            ).bfloat16()
            for i in range(2)
        }
        write_checkpoint(Path(name), made)
    plan("ties", "weight: 0.5, density: 0.3")
    used = peak(24 * MIB) - bare
    assert used < 24 + SLACK, f"{used:.0f} MiB"


def test_four_times_the_tensors_take_no_more_memory() -> None:
    plan("task_arithmetic", "weight: 0.5")
    write(100, MIB // 16)
    few = peak(32 * MIB)
    Path("out").rename("few")
    write(400, MIB // 16)
    many = peak(32 * MIB)
    assert many < few + 6
