"""bake(): fitted weights -> one checkpoint, checked against what the fused models say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.checkpoint import card
from mergekit_ft.engine import Result, Story, resolve_plan, run
from mergekit_ft.errors import MergekitError, PlanError, WriteError
from mergekit_ft.fusion.collecting import Collection, collect, open_models
from mergekit_ft.fusion.fitting import references
from mergekit_ft.fusion.refining import STEPS, Coefficients, Refiner
from mergekit_ft.fusion.texts import read_texts
from mergekit_ft.fusion.verifying import Measured, excess, measured, report
from mergekit_ft.fusion.weights import Weights, read_weights
from mergekit_ft.merged import load
from mergekit_ft.models.opening import open_base, quiet
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.plan import ModelReference
from mergekit_ft.plan.fusing import FusePlan, read_fuse
from mergekit_ft.resolution import Resolution
from mergekit_ft.resolution.opening import open_reference
from mergekit_ft.sources.dtypes import TORCH

Words = dict[str, Any]
FILE = "mergekit_ft.fusion.json"  # weights and figures, beside what was made of them


@dataclass(frozen=True)
class Baked:
    """A checkpoint made of fitted weights."""

    result: Result
    measured: Measured  # as written
    alpha: Mapping[str, float]
    first: Measured | None = None  # before it was refined
    notes: list[str] = field(default_factory=list)


def bake(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    domain: str | None = None,
    refine: bool = True,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Baked:
    """Write theta_0 + sum alpha_t (theta_t - theta_0) to `out`, verified on held-out places.

    Where the merged model is too far from the fused ones, its coefficients are refined tensor by
    tensor, unless `refine` is false. Options are fields of `Options`. Raises `MergekitError`, and
    leaves no `out` behind.
    """
    chosen, to, watcher = Options(**options), Path(out), progress or Unwatched()
    held = read_weights(weights)
    if os.path.lexists(to) and not (chosen.overwrite or chosen.resume):
        raise WriteError(f"{to} exists; give --overwrite, or another name")
    require_alike(held, chosen)
    work = to.with_name(to.name + ".work") if cache is None else Path(cache)
    with quiet():
        made = baked(held, to, domain, refine, work, chosen, watcher, {})
    if cache is None:
        shutil.rmtree(work)
    return made


def baked(
    weights: Weights,
    out: Path,
    domain: str | None,
    refine: bool,
    work: Path,
    options: Options,
    watcher: Progress,
    more: Mapping[str, Any],
) -> Baked:
    """Bake; what the models said is read from `work`, and `more` are words of the merge's plan."""
    words = plan_of(weights)
    models = open_models(references(words), options.offline)
    texts = read_texts(words.calibration, models.tokenizer)
    if not any(part.held for part in texts.parts):
        raise PlanError("nothing was held out to verify on; fit with `held_out:` above 0")
    dtype = getattr(torch, words.calibration.dtype)
    collection = collect(models, texts, work, dtype, options, watcher)
    alpha, tokenizer = weights.chosen(domain), models.tokenizer
    baking = _Baking(weights, alpha, collection, tokenizer, options, watcher, more)
    return baking.baked(out, domain, refine)


def plan_of(weights: Weights) -> FusePlan:
    """Return the plan that weights were fitted by."""
    words, _ = read_fuse(str(weights.story.get("plan", "")) + "\n")
    return words


def require_alike(weights: Weights, options: Options) -> None:
    """Refuse, from headers alone, experts whose shift cannot be put into the base's weights."""
    if weights.small is not None:
        raise PlanError(
            f"the experts were tuned from {weights.small}, not from {weights.base}, so what they "
            "changed is of another model's weights; decode with the weights file instead"
        )
    for model in (weights.base, *weights.experts.values()):
        open_reference(model, offline=options.offline).close()
    try:
        resolve_plan(merge_words(weights, weights.alpha), options).close()
    except MergekitError as error:
        raise type(error)(
            f"the experts' weights are not like those of {weights.base}, so they cannot be baked "
            f"(fused decoding needs the vocabulary alone): {error}"
        ) from error


def merge_words(
    weights: Weights, alpha: Mapping[str, float], refined: Coefficients | None = None
) -> Words:
    """Return the plan of the merge."""

    def entry(t: int, name: str, model: ModelReference) -> Words:
        factor = alpha[name] if refined is None else list(_by_tensor(t, refined))
        return {"model": _plain(model), "parameters": {"weight": factor}}

    models = [entry(t, name, model) for t, (name, model) in enumerate(weights.experts.items())]
    return {"merge_method": "logit_fusion", "base_model": _plain(weights.base), "models": models}


def _by_tensor(t: int, at: Coefficients) -> Iterator[Words]:
    for tensor, value in at.of(t):
        yield {"match": escape(tensor), "value": round(value, 6)}


def _plain(model: ModelReference) -> Any:
    return model.model_dump(exclude_none=True)


@dataclass(frozen=True)
class _Baking:
    """A merge on its way from weights to files."""

    weights: Weights
    alpha: Mapping[str, float]
    collection: Collection
    tokenizer: Any
    options: Options
    watcher: Progress
    more: Mapping[str, Any]  # words of the merge's plan

    def plan(self, refined: Coefficients | None = None) -> Words:
        """Return the plan of the merge."""
        return {**merge_words(self.weights, self.alpha, refined), **self.more}

    def baked(self, out: Path, domain: str | None, refine: bool) -> Baked:
        """Verify, refine where that is needed, and write."""
        plan, first, notes = self.plan(), None, []
        found = self.measured(plan)
        if excess(found) > 1 and refine:
            again = self.plan(self.refined(plan))
            better = self.measured(again)
            if excess(better) < excess(found):
                plan, first, found = again, found, better
            else:
                notes.append("refining brought the merge no nearer on held-out places; left out")
        if excess(found) > 1:
            notes.append(
                "the merge does not say what the fused models say: it is "
                f"{excess(found):.1f} times as far from them as is near; see the figures, or "
                "decode with the weights file"
            )
        resolution = resolve_plan(plan, self.options)
        try:
            story = FusionStory(self.weights, domain, found, first)
            result = run(resolution, out, self.options, Unwatched(), story)
        finally:
            resolution.close()
        return Baked(result, found, self.alpha, first, [*notes, *result.notes])

    def measured(self, plan: Words) -> Measured:
        """Verify a merge before it is written: its weights are rounded as they will be stored."""
        names = list(self.weights.experts)
        held = sum(part.stop - part.start for part in self.collection.texts.parts if part.held)
        model = load(plan, offline=self.options.offline).float().to(self.options.torch_device)
        factors = torch.tensor([self.alpha[name] for name in names], dtype=torch.float64)
        self.watcher.start(held, "asking the merged model")
        try:
            speaker = ModelSpeaker(model, self.tokenizer, "the merged model")
            return measured(speaker, self.collection, names, factors, self.watcher.advance)
        finally:
            self.watcher.close()

    def refined(self, plan: Words) -> Coefficients:
        """Return a coefficient for each tensor that the plan would store."""
        offline = self.options.offline
        base = open_base(self.weights.base, offline=offline)
        models = self.weights.experts
        sources = {name: open_reference(models[name], offline=offline) for name in models}
        factors = [self.alpha[name] for name in models]
        with closing(resolve_plan(plan, self.options)) as resolution:
            stored = {t.known: TORCH[t.dtype] for t in resolution.tasks if t.operator is not None}
        refiner = Refiner(base, sources, self.collection, factors, stored, self.watcher.advance)
        self.watcher.start(refiner.places * (STEPS + 1), "refining the coefficients of each tensor")
        try:
            return refiner.refined()[0]
        finally:
            self.watcher.close()
            for source in sources.values():
                source.close()


@dataclass(frozen=True)
class FusionStory(Story):
    """That the weights of a merge were fitted: how, and how the merge fares."""

    weights: Weights
    domain: str | None
    found: Measured
    first: Measured | None
    what = "merging"

    def words(self) -> dict[str, Any]:
        """Return weights and figures for JSON."""
        told = {"domain": self.domain, "held_out": report(self.found)}
        if self.first is not None:
            told["before_refining"] = report(self.first)
        return {**self.weights.report(), "baked": told}

    def files(self, resolution: Resolution) -> Mapping[str, bytes]:
        """Return the plan, and the weights with their figures."""
        text = json.dumps(self.words(), indent=2, ensure_ascii=False) + "\n"
        return {**super().files(resolution), FILE: text.encode()}

    def receipt(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """Return the receipt with what was fitted."""
        return {**receipt, "fusion": self.words()}

    def card(self, resolution: Resolution, receipt: Mapping[str, Any]) -> str:
        """Return the README.md."""
        return card.joined([card.card(resolution, receipt).rstrip(), "\n".join(_table(self.found))])


def _table(found: Measured) -> Iterator[str]:
    yield "## Against the fused models\n"
    yield "On places held out of the fit; nats a token, KL of the fused models to each.\n"
    yield "| domain | base | fused | merged | KL to merged | KL to base | same first token |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for domain, m in found.items():
        nats = " | ".join(f"{m[column]:.3f}" for column in list(m)[:5])
        yield f"| {domain} | {nats} | {m['agreement']:.1%} |"
