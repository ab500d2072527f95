"""The stories under examples/ run, on models made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.compared_tuners import compare
from examples.edited_facts import story as editing
from examples.fused_experts import story as speaking
from examples.two_experts import demo
from mergekit_ft.plan.tuning import read_tune

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
    assert editing.main(["--small", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "every file has its old SHA-256" in printed
    assert (tmp_path / "patch.safetensors").stat().st_size < 2**20


def test_ways_to_tune_are_compared_each_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--small", "--only", "lift", "--out", str(tmp_path)]
    assert compare.main(words) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["base", "lift"]
    assert set(figures["lift"]["seeds"]) == {"0", "1"}
    assert figures["lift"]["learning_rate"] in compare.RATES["lift"]
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in (tmp_path / "runs").iterdir() if p.is_dir()]  # weights are dropped
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert compare.main(words) == 0
    assert made == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert "| lift |" in capsys.readouterr().out


def test_the_plans_that_are_compared_are_of_all_ways_and_can_be_read() -> None:
    plans = {p.name.removesuffix(".tune.yaml"): p for p in compare.PLANS.iterdir()}
    assert set(plans) == set(compare.RATES)
    for name, plan in plans.items():
        assert read_tune(plan).accepted()
        way = compare.Way(name, 5e-4, 1)
        text = way.plan(compare.HOME, None)
        assert "learning_rate: 5e-04" in text
        assert "seed: 1" in text


def test_experts_speak_as_one_on_small_models(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert speaking.main(["--small", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "weights, all domains: orders" in printed
    assert "factors: orders 1.00" in printed  # the base is its own small model
    assert str(tmp_path / "weights.json") in printed.split("Measuring")[1]
