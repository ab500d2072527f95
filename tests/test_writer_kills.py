"""Runs in processes of their own, killed at any moment."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_models import cli, hashes, three, write_models

SLOWED = """
import sys, time
from mergekit_ft import engine, writer
writer.BATCH = 1
write = writer.Writer.write
writer.Writer.write = lambda *given: (time.sleep(0.05), write(*given))[1]
engine.merge("plan.yaml", "same/out", resume=True, threads=int(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with ./base, ./maths, ./chat and a plan."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, layers=8)
    Path("plan.yaml").write_text(three("dare_ties", "weight: 0.6, density: 0.5"))


def start(threads: int) -> subprocess.Popen[str]:
    """Start a run and wait until it writes."""
    run = subprocess.Popen(
        [sys.executable, "-c", SLOWED, str(threads)], stderr=subprocess.PIPE, text=True
    )
    while not Path("same/out.part/model.safetensors").exists() and run.poll() is None:
        time.sleep(0.01)
    return run


def test_killed_three_times_at_any_moment_it_ends_at_the_same_bytes() -> None:
    assert cli("merge", "plan.yaml", "same/out").exit_code == 0
    expected = hashes("same/out")
    Path("same").rename("before")
    for threads in (1, 2, 1):
        run = start(threads)
        time.sleep(random.uniform(0.0, 0.5))
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.communicate()
        assert not Path("same/out").exists()
    assert cli("merge", "plan.yaml", "same/out", "--resume").exit_code == 0
    assert hashes("same/out") == expected
    assert [path.name for path in Path("same").iterdir()] == ["out"]


def test_two_processes_never_write_to_one_output() -> None:
    run = start(1)
    for options in ([], ["--resume"], ["--overwrite"]):
        result = cli("merge", "plan.yaml", "same/out", *options)
        assert result.exit_code == 6
        assert "another run is writing there; wait for it or stop it" in result.stderr
    assert run.wait() == 0, run.communicate()
    assert cli("verify", "same/out").exit_code == 0


def test_ctrl_c_is_told_and_can_be_resumed() -> None:
    slowed = SLOWED.replace(
        'engine.merge("plan.yaml", "same/out", resume=True, threads=int(sys.argv[1]))',
        'from mergekit_ft.cli import main\nmain(["merge", "plan.yaml", "same/out"])',
    )
    run = subprocess.Popen([sys.executable, "-c", slowed], stderr=subprocess.PIPE, text=True)
    while not Path("same/out.part/model.safetensors").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "interrupted; the same command with --resume goes on from here" in said
    assert not Path("same/out").exists()
    assert cli("merge", "plan.yaml", "same/out", "--resume").exit_code == 0
