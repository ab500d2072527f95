"""What a smaller model learned moves a larger one: losses and answers of a task's held-out rows.

    python benchmarks/weak_to_strong.py [DEMO] [--work FOLDER] [--texts N] [--steps N]

DEMO is what `make demo` leaves; its base is the larger model, which sees nothing of the tasks. The
smaller one is that model without LAYERS of its layers, healed on texts that the larger one wrote
(a user's turn from the template alone, then its answer), and tuned on each task by the demo's plan.
Printed: what each says of held-out rows, alone and fused, and the larger one tuned, as `eval` does.
The models stay in FOLDER, for `benchmarks/fused_decoding.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from examples.two_experts.demo import PLANS
from examples.two_experts.items import TASKS, TURN, neutral_rows, rows_of
from mergekit_ft.models.decoding import Stop, answers, sampled
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.resolution.opening import reference_of

LAYERS = (14, 24)  # that are cut out of 30: from, up to
USER = TURN.split("{", maxsplit=1)[0]
LIMITS = (48, 96)  # tokens of a user's turn, of an answer
WARMTH = 0.7  # temperature of its texts
KEPT = 1.0  # factor of proxy tuning


def main() -> None:
    """Make the models, and print what they say."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("demo", type=Path, nargs="?", default=Path(".cache/demo"))
    asked.add_argument("--work", type=Path)
    asked.add_argument("--texts", type=int, default=384)
    asked.add_argument("--steps", type=int, default=120)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        measure(given.demo, made(given.demo / "base", work, given.texts, given.steps))


def made(large: Path, work: Path, texts: int, steps: int) -> Path:
    """Cut, heal and tune the smaller models; what is there already stays."""
    layers = json.loads((large / "config.json").read_text())["num_hidden_layers"]
    ranges = [[0, LAYERS[0]], [LAYERS[1], layers]]
    sources = [{"sources": [{"model": str(large), "layer_range": r}]} for r in ranges]
    step("merge", {"merge_method": "passthrough", "slices": sources}, work / "cut")
    written = work / "written.jsonl"
    if not written.exists():
        write(written, [{"text": text} for text in told(large, texts)])
    training = {"steps": steps, "batch": 8, "learning_rate": 3e-4, "schedule": "cosine"}
    data = {"train": str(written), "rows": "raw"}
    plan = {"base": str(work / "cut"), "data": data, "tuner": "full", "training": training}
    step("tune", plan, work / "small")
    for task in TASKS:
        (work / f"{task}.train.jsonl").write_text(rows_of(task, "train"), encoding="utf-8")
        (work / f"{task}.jsonl").write_text(rows_of(task, "heldout"), encoding="utf-8")
        plan = yaml.safe_load((PLANS / f"{task}.tune.yaml").read_text(encoding="utf-8"))
        plan["base"], plan["data"]["train"] = str(work / "small"), str(work / f"{task}.train.jsonl")
        step("tune", plan, work / f"small-{task}")
    (work / "neutral.jsonl").write_text(neutral_rows(), encoding="utf-8")
    return work


def told(large: Path, count: int) -> list[str]:
    """Return turns that a model wrote for both sides."""
    speaker, dice = open_speaker(reference_of(str(large))), torch.Generator().manual_seed(0)

    def after(prompts: list[str], most: int) -> list[str]:
        tokens = [speaker.tokenizer(prompt)["input_ids"] for prompt in prompts]
        found = answers(speaker, tokens, Stop(most=most), batch=32, pick=sampled(WARMTH, dice))
        return [answer.text for _, answer in sorted(found, key=lambda pair: pair[0])]

    turns = [TURN.format(prompt=text) for text in after([USER] * count, LIMITS[0])]
    ends = speaker.tokenizer.eos_token
    return [a + b + ends for a, b in zip(turns, after(turns, LIMITS[1]), strict=True)]


def measure(demo: Path, work: Path) -> None:
    """Print what every model makes of held-out rows."""
    for task in TASKS:
        small, expert = str(work / "small"), str(work / f"small-{task}")
        fused = {"base": str(demo / "base"), "small": small, "experts": {task: expert}}
        plans = {"proxy": {**fused, "alpha": {task: KEPT}}, "searched": fused}
        for name, words in plans.items():
            (work / f"{task}-{name}.yaml").write_text(yaml.safe_dump(words))
        told_of = [demo / "base", small, expert, *(work / f"{task}-{n}.yaml" for n in plans)]
        run("eval", *map(str, told_of), str(demo / task),
            "--task", f"{task}={work / f'{task}.jsonl'}",
            "--task", f"neutral={work / 'neutral.jsonl'}",
            "--measure", "loss", "--measure", "exact_match", "--rows", "raw")  # fmt: skip


def step(command: str, plan: dict[str, Any], out: Path) -> None:
    """Carry out a plan unless its output is there."""
    if not out.exists():
        words = out.with_name(f"{out.name}.yaml")
        words.write_text(yaml.safe_dump(plan))
        run(command, str(words), str(out))


def run(*words: str) -> None:
    """Run `mergekit-ft`."""
    print("mergekit-ft", *words, flush=True)
    subprocess.run([sys.executable, "-m", "mergekit_ft", *words], check=True)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
