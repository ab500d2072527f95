"""The stories under examples/ run, on models made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.edited_facts import story
from examples.two_experts import demo

ROWS = {"base", "expert: orders", "expert: triage"}


def test_the_demo_runs_on_a_small_model_and_draws_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--small", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) > ROWS
    assert len(figures) == len(ROWS) + 3  # three merges
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(row in printed for row in figures)


def test_no_held_out_item_of_the_demo_is_trained_on() -> None:
    data = Path(demo.__file__).parent / "data"
    for task in ("orders", "triage"):
        prompts = [
            {json.loads(line)["prompt"] for line in (data / f"{task}.{part}.jsonl").open()}
            for part in ("train", "heldout")
        ]
        assert prompts[0]
        assert prompts[1]
        assert not prompts[0] & prompts[1]


def test_facts_go_into_a_small_model_and_out_of_it_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert story.main(["--small", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "every file has its old SHA-256" in printed
    assert (tmp_path / "patch.safetensors").stat().st_size < 2**20
