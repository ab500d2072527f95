"""Fit how much each of two experts moves their base, let them answer as one, and measure that.

`python examples/fused_experts/story.py`, once `make demo` made the experts; `--small`: tiny ones.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: let it see the folder it is a part of
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.two_experts import demo
from examples.two_experts.demo import quiet, say, step
from examples.two_experts.items import TASKS, rows_of

HERE = Path(__file__).parent
HOME, DEMO = Path(".cache/fused"), demo.HOME  # what the plans are written for
LIMIT = 24  # held-out items of each task that are answered


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell the story."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny random models")
    parser.add_argument("--out", type=Path, help="where to work (.cache/fused or -small)")
    options = parser.parse_args(arguments)
    home = options.out or (HOME.with_name("fused-small") if options.small else HOME)
    home.mkdir(parents=True, exist_ok=True)
    quiet()
    experts = DEMO
    if options.small:
        experts = home / "demo"
        experts.mkdir(exist_ok=True)
        story = demo.small_story(experts)
        demo.make_base(story)
        demo.make_experts(story)
    elif not all((DEMO / name).exists() for name in ("base", *TASKS)):
        raise SystemExit(f"{DEMO} has no experts yet: run `make demo` first")
    limit = 2 if options.small else LIMIT
    for task in TASKS:
        for split in ("train", "heldout"):
            rows = rows_of(task, split)
            (home / f"{task}.{split}.jsonl").write_text(rows, encoding="utf-8")
    fitted = home / "weights.json"
    step("Fitting a weight for each expert by what the models say")
    command("fuse", "fit", str(plan(home, experts, "fit.yaml")), str(fitted), "--overwrite")
    step("Letting both experts answer as one")
    prompts = [json.loads(rows_of(task, "heldout").split("\n")[0])["prompt"] for task in TASKS]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    more = ["--rows", "raw", "--max-new-tokens", "4" if options.small else "32"]
    command("fuse", "generate", str(fitted), *asked, *more)
    step("Letting the search decide how far one expert moves each token")
    searched = plan(home, experts, "searched.yaml")
    command("fuse", "generate", str(searched), *asked[:2], *more, "--factors")
    step("Measuring the fused models beside base and experts")
    models = [str(experts / name) for name in ("base", *TASKS)]
    tasks = [word for t in TASKS for word in ("--task", f"{t}={home / f'{t}.heldout.jsonl'}")]
    measured = ["--measure", "loss", "--measure", "exact_match", "--rows", "raw"]
    command("eval", *models, str(fitted), *tasks, *measured, "--limit", str(limit))
    return 0


def plan(home: Path, experts: Path, name: str) -> Path:
    """Give a plan as shipped, or a copy of it for other folders."""
    if home == HOME and experts == DEMO:
        return HERE / name
    text = (HERE / name).read_text(encoding="utf-8")
    text = text.replace(f"{HOME}/", f"{home}/").replace(f"{DEMO}/", f"{experts}/")
    copy = home / name
    copy.write_text(text, encoding="utf-8")
    return copy


def command(*words: str) -> None:
    """Run mergekit-ft; its own words tell what it found, or what went wrong."""
    shown = " ".join(word if " " not in word else repr(word) for word in words)
    say(f"  mergekit-ft {shown}")
    if subprocess.run([sys.executable, "-m", "mergekit_ft", *words]).returncode:
        raise SystemExit("It failed; the lines above say why.")


if __name__ == "__main__":
    sys.exit(main())
