"""What comes out of a tuning: the base's checkpoint with what was learned in its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ft import registry
from mergekit_ft.blocks import view_of
from mergekit_ft.checkpoint import card
from mergekit_ft.deltas.extract import Asked, Extracted, between
from mergekit_ft.deltas.pairs import Choice
from mergekit_ft.engine import Result, Story, run
from mergekit_ft.options import Options, Progress
from mergekit_ft.plan import ModelReference, read
from mergekit_ft.plan.tuning import TunePlan
from mergekit_ft.resolution import Resolution
from mergekit_ft.resolution import resolve as resolve_with
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.dtypes import CODE, SIZE, TORCH
from mergekit_ft.sources.files import Reader

PLAN = "mergekit_ft.tune.yaml"  # the plan, beside what it made
STAGE = "tuned"


class _Held:
    """Reads tensors that are in memory; the rest from where it lies."""

    def __init__(self, below: Reader, held: Mapping[str, Tensor]) -> None:
        self._below, self._held = below, held
        self.overhead = below.overhead

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        tensor = self._held.get(info.name)
        if tensor is None:
            self._below.read_into(info, start, into)
        else:
            into[:] = view_of(tensor)[start : start + len(into)]

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Say that these bytes will be read soon."""
        if info.name not in self._held:
            self._below.will_need(info, start, nbytes)

    def close(self) -> None:
        """Give back what is held open."""
        self._below.close()


def in_memory(base: Source, held: Mapping[str, Tensor]) -> Source:
    """Return a source with these host tensors in place of its own, to be stored in its dtypes."""
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in held.items()}
    infos = [_info(info, whole.get(name)) for name, info in base.items()]
    made = derived(base, infos, _Held(base.reader, whole))
    made.origins = base.origins or (base,)
    return made


def _info(info: TensorInfo, held: Tensor | None) -> TensorInfo:
    if held is None:
        return info
    code = CODE[held.dtype]
    return replace(info, dtype=code, nbytes=info.numel * SIZE[code], stored=info.kept)


@dataclass(frozen=True)
class TuneStory(Story):
    """That the weights were tuned: the plan, the curves, what was measured."""

    plan: TunePlan
    facts: Mapping[str, Any]  # of the run: what trained, how long, losses
    folder: Path  # where the curves lie
    curves: tuple[str, ...]
    what = "writing"

    def files(self, resolution: Resolution) -> Mapping[str, bytes]:
        """Return the plan and the curves."""
        found = {name: (self.folder / name).read_bytes() for name in self.curves}
        return {PLAN: self.plan.text.encode(), **found}

    def receipt(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """Return the receipt: a training is told, for it is not computed again."""
        told = {"plan": self.plan.text, "method": self.plan.tuner.method, "then": []}
        return {**receipt, **told, "tuning": dict(self.facts)}

    def card(self, resolution: Resolution, receipt: Mapping[str, Any]) -> str:
        """Return the README.md."""
        return tune_card(self.plan, self.facts, resolution, receipt, self.curves)


def write_full(
    reference: ModelReference,
    held: Mapping[str, Tensor],
    out: Path,
    story: Story,
    options: Options,
    watcher: Progress,
    **opening: Any,
) -> Result:
    """Write the base with these tensors in place of its own: its layout, dtypes and side files."""
    base = {"model": reference.model_dump(exclude_none=True)}
    stage = {"name": STAGE, "merge_method": "passthrough", "models": [base]}
    final = {
        "merge_method": "task_arithmetic",
        "base_model": base["model"],
        "models": [{"model": STAGE, "parameters": {"weight": 1.0}}],
    }
    resolution = resolve_with(
        read([stage, final]), lambda _, found: in_memory(found.donor, held), **opening
    )
    try:
        return run(resolution, out, options, watcher, story)
    finally:
        resolution.close()


def write_delta(
    base: Source,
    held: Mapping[str, Tensor],
    out: Path,
    plan: TunePlan,
    facts: Mapping[str, Any],
    curves: list[dict[str, Any]],
    options: Options,
    watcher: Progress,
) -> Extracted:
    """Write what was learned as a delta to the base, rounded to the base's dtypes."""
    rounded = {name: tensor.to(TORCH[base[name].kept]) for name, tensor in held.items()}
    told = {
        "method": plan.tuner.method,
        "parameters": {**plan.tuner.parameters, "objective": plan.objective.method},
        "seed": plan.training.seed,
        "provenance": {"plan": plan.text, "facts": dict(facts), "curves": curves},
    }
    with in_memory(base, rounded) as tuned:
        return between(base, tuned, out, Asked(), Choice(), options, watcher, told)


def tune_card(
    plan: TunePlan,
    facts: Mapping[str, Any],
    resolution: Resolution,
    receipt: Mapping[str, Any],
    curves: Iterable[str],
) -> str:
    """Return the README.md of a tuned model."""
    tuner, objective = plan.tuner.method, plan.objective.method
    return card.joined(
        [
            card.front(resolution, "finetune"),
            f"# {tuner} of {Path(plan.base.path).name}",
            "A model tuned with mergekit-ft.",
            f"- **Tuner** `{tuner}`: {registry.summary(tuner)}",
            f"- **Objective** `{objective}`: {registry.summary(objective)}",
            card.models(resolution),
            training_section(facts, curves),
            f"## Plan\n\n{card.fenced(plan.text.strip(), 'yaml')}\n\n`{PLAN}` holds the same text.",
            card.receipt_of(receipt),
        ]
    )


def training_section(facts: Mapping[str, Any], curves: Iterable[str]) -> str:
    """Return what a card says of the training."""
    picture = "![loss](curves.png)\n\n" if "curves.png" in curves else ""
    rows = [f"- {key.replace('_', ' ')}: {_said(value)}" for key, value in facts.items()]
    return f"## Training\n\n{picture}" + "\n".join(rows)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
