"""A training that is stopped goes on to the same weights; what it leaves, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from mergekit_ft.deltas.putting import apply
from mergekit_ft.errors import MergekitError, OperatorError, PlanError, SourceError, WriteError
from mergekit_ft.sources.delta_file import open_delta
from mergekit_ft.tuning import trainer, tune, watching
from mergekit_ft.tuning.company import Company
from tests.small_models import cli, hashes
from tests.tuned import ROWS, plan, rows, small_base

TUNERS: list[Any] = [
    "full",
    {"lift": {"rank": 2, "interval": 2}},
    {"lt_sft": {"k": 300}},
    {"hft": {"redraw": 2}},
    {"sara": {"density": 0.1, "rank_loss": 0.0}},
]


def killed(words: dict[str, Any], out: Path, after: int, patch: pytest.MonkeyPatch) -> None:
    """Run until so many steps were done in all phases, and die there."""
    done = [0]
    step = trainer.TuningTrainer._after_step

    def dying(self: Any, optimizer: Any, *args: Any) -> None:
        done[0] += 1
        if done[0] > after:
            raise KeyboardInterrupt
        step(self, optimizer, *args)

    with patch.context() as here:
        here.setattr(trainer.TuningTrainer, "_after_step", dying)
        with pytest.raises(KeyboardInterrupt):
            tune(words, out, resume=True)
    assert not out.exists()


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t if isinstance(t, str) else next(iter(t)))
def test_a_killed_training_goes_on_to_the_same_bytes(
    tuner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = plan(tmp_path, tuner, save_every=2, schedule="cosine", warmup=2, clip=0.5)
    tune(words, tmp_path / "whole")
    stops = (3, 5, 3) if "lt_sft" in tuner else (3, 2)
    for after in stops:
        killed(words, tmp_path / "broken", after, monkeypatch)
    tune(words, tmp_path / "broken", resume=True)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")
    assert not (tmp_path / "broken.work").exists()


def test_checkpoints_that_no_plan_asks_for_come_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = plan(tmp_path, "full", schedule="cosine")
    tune(words, tmp_path / "whole")
    killed(words, tmp_path / "broken", 3, monkeypatch)
    assert not list(tmp_path.glob("broken.work/phase-1/checkpoint-*"))  # not a minute has passed
    monkeypatch.setattr(watching, "LEAST", 0.0)
    monkeypatch.setattr(watching, "TIMES", 0.0)
    killed(words, tmp_path / "broken", 3, monkeypatch)
    (kept,) = tmp_path.glob("broken.work/phase-1/checkpoint-*")
    assert kept.name == "checkpoint-3"
    tune(words, tmp_path / "broken", resume=True)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")


def test_writing_checkpoints_takes_at_most_a_twentieth_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked = [0.0], []
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    paced, state = watching.Paced(Company()), TrainerState(max_steps=1000)
    for step in range(1, 1001):
        now[0], state.global_step = now[0] + 1, step  # a step takes a second
        control = TrainerControl()
        paced.on_step_end(None, state, control)
        if control.should_save:
            now[0] += 30  # an evaluation
            paced.on_evaluate(None, state, control)
            now[0] += 10  # what is written takes ten
            paced.on_save(None, state, control)
            asked.append(step)
    assert asked == [60, 260, 460, 660, 860]


def test_a_stopped_training_of_another_plan_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = plan(tmp_path, "full", save_every=2)
    killed(words, tmp_path / "out", 3, monkeypatch)
    words["training"]["learning_rate"] = 2e-3
    with pytest.raises(WriteError, match="another plan, other data or another base"):
        tune(words, tmp_path / "out", resume=True)
    tune(words, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_there_is_kept_unless_told(tmp_path: Path) -> None:
    words = plan(tmp_path, "full", steps=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(WriteError, match="exists; give --overwrite"):
        tune(words, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


def test_the_output_keeps_the_bases_dtype_layout_and_side_files(tmp_path: Path) -> None:
    small_base(tmp_path / "base", dtype=torch.bfloat16)
    (tmp_path / "base" / "notes.txt").write_text("mine")
    tune(plan(tmp_path, "full", steps=2), tmp_path / "out")
    made, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    receipt = json.loads((tmp_path / "out" / "mergekit_ft.lock.json").read_text())
    assert receipt["tuning"]["steps"] == 2
    assert receipt["method"] == "full"
    assert cli("verify", str(tmp_path / "out")).exit_code == 0


def test_the_curves_tell_every_phase(tmp_path: Path) -> None:
    words = plan(tmp_path, {"lt_sft": {"k": 100}}, steps=4, log_every=1, evaluate_every=2)
    words["data"]["validation"] = 0.25
    tune(words, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert [(e["phase"], e["step"]) for e in found if "loss" in e] == [
        (phase, step) for phase in (1, 2) for step in (1, 2, 3, 4)
    ]
    assert [(e["phase"], e["step"]) for e in found if "eval_loss" in e] == [
        (1, 2),
        (1, 4),
        (2, 2),
        (2, 4),
    ]


def test_early_stopping_gives_the_best_weights(tmp_path: Path) -> None:
    words = plan(tmp_path, "full", steps=40, learning_rate=0.05, evaluate_every=2, early_stop=2)
    words["data"]["validation"] = str(rows(tmp_path, ROWS[:4], "other.jsonl"))
    tune(words, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    losses = [entry["eval_loss"] for entry in found if "eval_loss" in entry]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) < 20 and best < len(losses) - 1
    again = plan(tmp_path, "full", steps=40, learning_rate=0.05)
    again["training"]["steps"] = 40
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert _loss(tmp_path / "out", tmp_path) == pytest.approx(losses[best], abs=1e-4)


def _loss(folder: Path, home: Path) -> float:
    """Return the validation loss of a model, by a training without a rate."""
    words = plan(home, {"modules": {"train": ["model.norm.weight"]}}, steps=1, learning_rate=1e-12)
    words["base"] = str(folder)
    words["data"]["validation"] = str(home / "other.jsonl")
    tune(words, home / "again", overwrite=True, allow_unchanged=True)
    found = json.loads((home / "again" / "curves.json").read_text())
    return float(next(entry["eval_loss"] for entry in found if "eval_loss" in entry))


def test_a_loss_that_leaves_the_numbers_is_an_error(tmp_path: Path) -> None:
    words = plan(tmp_path, "full", steps=5, learning_rate=1e30)
    with pytest.raises(OperatorError, match="not finite"):
        tune(words, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a"}', "rows.jsonl:2: keys prompt (a row has: prompt + completion; messages"),
        ('{"prompt": "a", "complection": "b"}', "did you mean 'completion'?"),
        ('{"prompt": "a", "completion": ""}', "rows.jsonl:2: completion is empty"),
        ('{"prompt": 3, "completion": "b"}', "rows.jsonl:2: prompt must be text"),
        ('{"prompt": "a", "completion": "b", "weight": -1}', "weight is a number from 0"),
        ("[1]", "rows.jsonl:2: a row is a JSON object"),
        ('{"prompt": ', "rows.jsonl:2: not JSON"),
        ('{"text": "x"}', "rows of different shapes: completion ("),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message is the assistant's"),
    ],
)
def test_a_faulty_row_is_told_with_its_line(line: str, told: str, tmp_path: Path) -> None:
    words = plan(tmp_path, "full")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(SourceError, match=re.escape(told)):
        tune(words, tmp_path / "out")


def test_a_row_cut_before_its_answer_is_refused(tmp_path: Path) -> None:
    words = plan(tmp_path, "full")
    words["data"]["max_length"] = 5
    with pytest.raises(SourceError, match="nothing is left to learn"):
        tune(words, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tuner": "liftt"}, "unknown tuner 'liftt'; did you mean 'lift'?"),
        ({"tuner": "ties"}, "ties is a method that merges, not a tuner"),
        ({"tuner": {"lift": {"rnak": 2}}}, "unknown key 'rnak'; did you mean 'rank'?"),
        ({"tuner": {"lift": {"rank": 0}}}, "rank must be at least 1"),
        ({"tuner": {"sara": {"tau": 1, "density": 0.1}}}, "density and tau both"),
        ({"tuner": {"modules": {}}}, "give one of train, freeze and file"),
        ({"objective": "dftt"}, "unknown objective 'dftt'; did you mean 'dft'?"),
        ({"bse": "x"}, "unknown key 'bse'; did you mean 'base'?"),
        ({"output": "delat"}, "output must be"),
        ({"output": "adapter"}, "full gives full or delta, not adapter"),
        ({"training": {"step": 3}}, "unknown key 'step'; did you mean 'steps'?"),
        ({"training": {"steps": 0}}, "steps must be at least 1"),
        ({"training": {"steps": 3, "epochs": 1}}, "steps and epochs both"),
        ({"training": {"early_stop": 3}}, "early_stop has no effect without"),
        (
            {"data": {"train": "a", "validation": 0.5}, "training": {"early_stop": 3}},
            "early_stop counts evaluations: say `evaluate_every:`",
        ),
        (
            {"training": {"early_stop": 3, "evaluate_every": 2, "save_every": 4}},
            "save_every has no effect: early_stop keeps",
        ),
        ({"training": {"warmup": -1}}, "warmup is a number of steps"),
        ({"data": {"train": 3}}, "a JSONL file, or a list of them"),
        ({"data": {}}, "missing key 'train'"),
    ],
)
def test_a_faulty_plan_is_told_before_anything_is_read(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    words = plan(tmp_path, "full") | change
    with pytest.raises(PlanError, match=re.escape(told)):
        tune(words, tmp_path / "out")


def test_all_faults_of_a_plan_are_in_one_report_with_their_places(tmp_path: Path) -> None:
    text = """\
base: ./base
data: {train: rows.jsonl, max_lenght: 3}
tuner: {lift: {rnak: 3}}
objective: nothing
training: {steps: many}
"""
    result = cli("tune", "-", str(tmp_path / "out"), text=text)
    assert result.exit_code == 3
    places = [line.split(": ")[0] for line in result.stderr.splitlines()]
    assert places == ["plan:2:27", "plan:3:16", "plan:4:12", "plan:5:19"]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    words = plan(tmp_path, {"modules": {"train": ["*.mpl.*"]}})
    with pytest.raises(PlanError, match=r"tuner: modules: matches no parameter .*: \*\.mpl\.\*"):
        tune(words, tmp_path / "out")


def test_a_delta_output_put_on_the_base_is_the_full_output(tmp_path: Path) -> None:
    small_base(tmp_path / "base", dtype=torch.bfloat16)
    words = plan(tmp_path, {"lift": {"rank": 4, "interval": 3}})
    tune(words, tmp_path / "full")
    del words["output"]
    tune(words, tmp_path / "d.safetensors")
    delta = open_delta(tmp_path / "d.safetensors")
    assert delta.words["method"] == "lift"
    assert delta.words["parameters"] == {"rank": 4, "interval": 3, "objective": "sft"}
    assert {change.kind for change in delta.changes.values()} == {"replace"}
    apply(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "on")
    made, full = (load_file(tmp_path / name / "model.safetensors") for name in ("on", "full"))
    assert all(torch.equal(made[name], full[name]) for name in full)


def test_the_name_of_the_output_fits_its_kind(tmp_path: Path) -> None:
    words = plan(tmp_path, "full", steps=1)
    with pytest.raises(WriteError, match="a full output, which is a folder"):
        tune(words, tmp_path / "out.safetensors")
    with pytest.raises(WriteError, match=r"ends in \.safetensors"):
        tune(words | {"output": "delta"}, tmp_path / "out")


TOGETHER = """
import json, sys
from pathlib import Path
from mergekit_ft.tuning import tune
for plan, out in json.loads(Path(sys.argv[1]).read_text()):
    tune(plan, out, device="cpu")
"""


def test_two_processes_learn_what_one_does_with_as_many_rows_a_step(tmp_path: Path) -> None:
    tuners = {"full": "full", "hft": {"hft": {"redraw": 2}}}
    tuners["lift"] = {"lift": {"rank": 4, "interval": 2}}
    tuners["lora"] = {"lora": {"rank": 2}}
    asked = []
    for name, tuner in tuners.items():
        both = {"objective": {"asft": {"lambda": 0.1}}, "clip": 0.1, "weight_decay": 0.1}
        words = plan(tmp_path, tuner, **both) | {"output": "full"}
        asked.append((words, str(tmp_path / f"two-{name}")))
        alone = plan(tmp_path, tuner, accumulation=2, **both) | {"output": "full"}
        tune(alone, tmp_path / f"one-{name}")
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "together.py").write_text(TOGETHER)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(tmp_path / "together.py"), str(tmp_path / "asked.json")]
    done = subprocess.run(
        [sys.executable, *words, *script], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for name in tuners:
        one, two = (
            load_file(tmp_path / f"{n}-{name}" / "model.safetensors") for n in ("one", "two")
        )
        base = load_file(tmp_path / "base" / "model.safetensors")
        assert any(not torch.equal(two[key], base[key]) for key in base)
        for key in one:
            assert torch.allclose(one[key], two[key], rtol=0, atol=2e-6), (name, key)
        first, second = (
            json.loads((tmp_path / f"{n}-{name}" / "curves.json").read_text())
            for n in ("one", "two")
        )
        assert [e["loss"] for e in first] == pytest.approx([e["loss"] for e in second], abs=1e-5)
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize("word", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_parameters_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(word, "true")
    with pytest.raises(PlanError, match=r"does not run under (FSDP|DeepSpeed).*--multi_gpu"):
        tune(plan(tmp_path, "full"), tmp_path / "out")


def test_pairs_are_for_dpo_alone(tmp_path: Path) -> None:
    with pytest.raises(MergekitError, match="dpo learns from pairs"):
        tune(plan(tmp_path, "full", objective="dpo"), tmp_path / "out")
