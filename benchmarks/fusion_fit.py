"""Weights fitted on logits against the best grid coefficient, on two experts of one small model.

    python benchmarks/fusion_fit.py [DEMO] [--work FOLDER] [--seed N] [--rounding]

DEMO is what `make demo` leaves (`base`, `orders`, `triage`). The demo's held-out items, which no
expert was trained on, are calibrated on by one half and measured on by the other. Printed: what is
kept on disk and how fast, what the kept dtype costs, a table of fused decoding, bakes and task
arithmetic at the best coefficient by the same calibration texts, and fits on one task alone,
without bounds and with the defaults, fused and merged. `--rounding` prints instead what storing
bfloat16 does to the first bake; `--seed` draws other halves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from examples.two_experts.items import DATA, TASKS, TURN
from mergekit_ft.algebra.fused import exact_sum
from mergekit_ft.fusion.baking import bake
from mergekit_ft.fusion.collecting import Collection, Recorded
from mergekit_ft.fusion.figures import figures
from mergekit_ft.fusion.fitting import FUSED, Fit, fit
from mergekit_ft.fusion.verifying import rows_of
from mergekit_ft.merged import load
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.resolution.opening import open_reference, reference_of

GRID = [i / 10 for i in range(4, 13)]  # of one coefficient for both task vectors


def main() -> None:
    """Print everything."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("demo", type=Path, nargs="?", default=Path(".cache/demo"))
    asked.add_argument("--work", type=Path)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--rounding", action="store_true")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        plan = plan_of(given.demo, work)
        plan["calibration"]["seed"] = given.seed
        (rounding if given.rounding else measure)(given.demo, work, plan)


def rounding(demo: Path, work: Path, plan: dict[str, Any]) -> None:
    """Print what rounding does to task vectors, and to what their merge says."""
    made = fitted(plan, work, "mixed")
    alpha = list(made.weights.alpha.values())
    for task, factor in zip(TASKS, alpha, strict=True):
        told_of_steps(demo, task, [factor, 0.3])
    for dtype in ("float32", "bfloat16"):
        print(f"merged, stored in {dtype}: {nats(demo, alpha, made.collection, dtype=dtype)}")


def told_of_steps(demo: Path, task: str, factors: list[float]) -> None:
    """Print how far an expert's weights moved, and how much of its vector is stored by factors."""
    count = moved = one = 0
    sums = torch.zeros(len(factors), 3, dtype=torch.float64)
    base, expert = (open_reference(reference_of(str(demo / name))) for name in ("base", task))
    for name in base:
        old, new = base.tensor(name).flatten(), expert.tensor(name).flatten()
        steps = (new.view(torch.int16).int() - old.view(torch.int16).int()).abs()
        count += steps.numel()
        moved += int((steps > 0).sum())
        one += int((steps == 1).sum())
        vector = new.double() - old.double()
        for i, factor in enumerate(factors):
            merged = (old.float() + factor * vector.float()).to(old.dtype)
            stored = merged.double() - old.double()
            sums[i] += torch.stack([vector @ vector, stored @ vector, stored @ stored])
    print(f"{task}: moved {moved / count:.1%} of the weights, {one / moved:.1%} of them by a step")
    for factor, (whole, along, stored) in zip(factors, sums.tolist(), strict=True):
        cosine = along / (whole * stored) ** 0.5
        print(f"  {factor:.2f} of its vector is stored as {along / whole:.2f}, cosine {cosine:.2f}")


def measure(demo: Path, work: Path, plan: dict[str, Any]) -> None:
    """Fit, bake and compare."""
    began = time.monotonic()
    mixed = fitted(plan, work, "mixed")
    told(mixed, time.monotonic() - began)
    lines = []
    for name, words in {
        "balanced (default)": {},
        "by place": {"balanced": False},
    }.items():
        made = fitted({**plan, "calibration": plan["calibration"] | words}, work, "w")
        for refine in (False, True):
            began = time.monotonic()
            baked = bake(work / "w.json", work / "out", cache=work / "cache", overwrite=True,
                         refine=refine)  # fmt: skip
            if refine and baked.first is None:
                continue
            what = f"{name}{', refined' if refine else ''}"
            lines += rows(what, made, baked.measured, time.monotonic() - began)
    print("| weights | domain | base | fused | merged | KL to merged | KL to base | agreement |")
    print("\n".join(["| --- " * 8 + "|", *lines]))
    for task in TASKS:
        alone(demo, task, plan, work, mixed.collection)
    arithmetic(demo, mixed.collection)
    costs(plan, work, mixed)


def plan_of(demo: Path, work: Path) -> dict[str, Any]:
    """Write the rows and return the plan."""
    work.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        items = map(json.loads, (DATA / f"{task}.heldout.jsonl").read_text().splitlines())
        found = [
            {"prompt": TURN.format(prompt=i["prompt"]), "completion": i["answer"]} for i in items
        ]
        text = "".join(json.dumps(row) + "\n" for row in found)
        (work / f"{task}.jsonl").write_text(text)
    data = {task: str(work / f"{task}.jsonl") for task in TASKS}
    return {
        "base": str(demo / "base"),
        "experts": {task: str(demo / task) for task in TASKS},
        "calibration": {"data": data, "rows": "raw", "held_out": 0.5},
    }


def fitted(plan: dict[str, Any], work: Path, name: str) -> Fit:
    """Fit, with what models said kept."""
    return fit(plan, work / f"{name}.json", cache=work / "cache", overwrite=True)


def told(made: Fit, seconds: float) -> None:
    """Print bytes and speed."""
    held, heard = made.collection, made.collection.seconds
    disk = sum(path.stat().st_size for path in held.files.values())
    n, v = held.shape.places, held.shape.vocabulary
    print(f"{n:,} places x {v:,} tokens x {held.shape.size} bytes x {len(held.files)} models = "
          f"{n * v * held.shape.size * len(held.files):,} bytes; on disk {disk:,}")  # fmt: skip
    if heard:
        rate = n * len(heard) / sum(heard.values())
        print(f"hearing: {rate:,.0f} places a second and model; fit in all {seconds:,.1f} s")
    print(f"weights {dict(made.weights.alpha)}; steps "
          f"{made.weights.story['diagnostics']['all']['steps']}")  # fmt: skip


def costs(plan: dict[str, Any], work: Path, half: Fit) -> None:
    """Print what the kept dtype moves."""
    for dtype in ("float32", "float16", "bfloat16"):
        words = {**plan, "calibration": plan["calibration"] | {"dtype": dtype}}
        made = half if dtype == "float16" else fitted(words, work, dtype)
        loss = made.weights.story["diagnostics"]["all"]["loss"]
        alpha = ", ".join(f"{a:.5f}" for a in made.weights.alpha.values())
        print(f"kept as {dtype}: weights {alpha}, loss {loss:.6f}, rounding "
              f"{made.weights.story['calibration']['rounding']:.1e} nats")  # fmt: skip
        if made is not half:
            for path in made.collection.files.values():
                path.unlink()


def rows(what: str, made: Fit, measured: dict[str, Any], seconds: float) -> list[str]:
    """Return a bake's rows of the table."""
    alpha = " ".join(f"{a:.2f}" for a in made.weights.alpha.values())
    return [
        f"| {what}: {alpha} ({seconds:.0f} s) | {domain} | "
        + " | ".join(f"{value:.3f}" for value in figures_.values()) + " |"
        for domain, figures_ in measured.items()
    ]  # fmt: skip


def arithmetic(demo: Path, collection: Collection) -> None:
    """Print task arithmetic at the best coefficient by the mean nats of the calibration texts."""
    found = {}
    for factor in GRID:
        parts = nats(demo, [factor] * len(TASKS), collection, held=False)
        found[factor] = sum(parts.values()) / len(parts)
        print(f"task arithmetic {factor:.1f}: {found[factor]:.4f} nats, calibration texts")
    best = min(found, key=lambda factor: found[factor])
    print(f"task arithmetic at {best:.1f}, held out: {nats(demo, [best] * 2, collection)}")


def nats(
    demo: Path,
    alpha: list[float],
    collection: Collection,
    held: bool = True,
    dtype: str = "bfloat16",
) -> dict[str, float]:
    """Return the nats of each domain of a merge, in float32 as stored in a dtype."""
    models = [{"model": str(demo / task), "parameters": {"weight": a}}
              for task, a in zip(TASKS, alpha, strict=True)]  # fmt: skip
    words = {"merge_method": "task_arithmetic", "base_model": str(demo / "base"), "models": models,
             "out_dtype": dtype}  # fmt: skip
    speaker = ModelSpeaker(load(words).float(), _Ends(), "merge")
    found = {}
    for part in collection.texts.parts:
        if part.held == held:
            factors = torch.tensor(alpha, dtype=torch.float64)
            sums = exact_sum(
                rows_of(speaker, collection, list(TASKS), factors, part, lambda n: None)
            )
            found[part.domain] = float(sums[3] / sums[0])
    return found


class _Ends:
    eos_token_id = None


def alone(demo: Path, task: str, plan: dict[str, Any], work: Path, mixed: Collection) -> None:
    """Print a fit on one task alone, unbounded and without anchor, then with the defaults."""
    data = {task: plan["calibration"]["data"][task]}
    loose = {"anchor": False, "data": data}
    free = {"dynamic_logit_fusion": {"low": None, "high": None, "ridge": 0.0}}
    cases = {
        f"{task} alone, no bounds, no ridge, no anchor": (loose, free),
        f"{task} alone, the defaults": ({"data": data}, {"dynamic_logit_fusion": {}}),
    }
    for what, (words, fusion) in cases.items():
        calibration = plan["calibration"] | words
        made = fitted({**plan, "calibration": calibration, "fusion": fusion}, work, "one")
        alpha = list(made.weights.alpha.values())
        print(f"{what}: weights {[round(a, 3) for a in alpha]}")
        texts, merged = mixed.texts, nats(demo, alpha, mixed)
        for domain in texts.domains:
            hearing = Recorded(mixed, list(TASKS), texts.spans([domain], held=True))
            found = figures(hearing, {FUSED: alpha})
            print(f"  {domain}, held out: base {found['base']:.3f}, fused {found[FUSED]:.3f}, "
                  f"merged {merged[domain]:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
