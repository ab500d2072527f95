"""fit(): a plan -> texts -> what every model says of them -> a weight for each expert."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergekit_ft import __version__
from mergekit_ft.errors import MergekitError, WriteError
from mergekit_ft.fusing import Fitted, Fusion
from mergekit_ft.fusion.collecting import (
    BASE,
    SMALL,
    TEACHER,
    Collection,
    Models,
    Recorded,
    collect,
    expert,
    open_models,
)
from mergekit_ft.fusion.figures import Figures, figures
from mergekit_ft.fusion.texts import read_texts
from mergekit_ft.fusion.weights import Weights, write_weights
from mergekit_ft.models.opening import quiet
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.plan import ModelReference
from mergekit_ft.plan.fusing import NEUTRAL, FusePlan, read_fuse

ALL = "all"
FUSED, OWN = "fused", "fused by domain"  # figures of the weights for all, and of the domain's own


@dataclass(frozen=True)
class Fit:
    """Fitted weights, how they fare, and what they were fitted by."""

    weights: Weights
    figures: Mapping[str, Mapping[str, Figures]]  # by domain, of "fitted" and "held out" places
    collection: Collection
    notes: list[str] = field(default_factory=list)


def fit(
    plan: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Fit:
    """Fit the weights that a plan asks for and write them to the JSON file `out`.

    What the models said is kept in `cache`, and read there again; without it in OUT.work, which a
    stopped run leaves behind and goes on from. Options are fields of `Options`.
    """
    chosen, to = Options(**options), Path(out)
    words, fusion = read_fuse(plan)
    if to.suffix != ".json":
        raise WriteError(f"{to}: weights are a file whose name ends in .json")
    if os.path.lexists(to) and not chosen.overwrite:
        raise WriteError(f"{to} exists; give --overwrite, or another name")
    work = to.with_name(to.name + ".work") if cache is None else Path(cache)
    found = fitted(words, fusion, work, chosen, progress or Unwatched())
    write_weights(found.weights, to)
    if cache is None:
        shutil.rmtree(work)
    return found


def fitted(
    words: FusePlan, fusion: Fusion, work: Path, options: Options, progress: Progress
) -> Fit:
    """Fit the weights; what the models said stays in `work`."""
    with quiet():
        models = open_models(references(words), options.offline)
        texts = read_texts(words.calibration, models.tokenizer)
        dtype = getattr(torch, words.calibration.dtype)
        collection = collect(models, texts, work, dtype, options, progress)
    return _fitted(words, fusion, models, collection)


def references(words: FusePlan) -> dict[str, ModelReference]:
    """Return the models that are heard, by role."""
    found = {BASE: words.base}
    if words.small is not None:
        found[SMALL] = words.small
    found |= {expert(name): model for name, model in words.experts.items()}
    return found if words.teacher is None else {**found, TEACHER: words.teacher}


def _fitted(words: FusePlan, fusion: Fusion, models: Models, collection: Collection) -> Fit:
    texts, names = collection.texts, list(words.experts)

    def hearing(domains: list[str], *, held: bool) -> Recorded:
        return Recorded(collection, names, texts.spans(domains, held=held))

    anchor = [NEUTRAL] if NEUTRAL in texts.domains else []
    tasks = [domain for domain in texts.domains if domain != NEUTRAL]
    scopes = {ALL: texts.domains, **{domain: [domain, *anchor] for domain in tasks}}
    fits: dict[str, Fitted] = {}
    for scope, domains in scopes.items():
        with _at(scope):
            same = scope != ALL and domains == texts.domains
            fits[scope] = fits[ALL] if same else fusion.fit(hearing(domains, held=False))
    found: dict[str, dict[str, Figures]] = {}
    for domain in texts.domains:
        alphas = {FUSED: fits[ALL].alpha}
        alphas |= {OWN: fits[domain].alpha} if domain in fits else {}
        found[domain] = {
            what: figures(hearing([domain], held=held), alphas)
            for what, held in (("fitted", False), ("held out", True))
            if texts.spans([domain], held=held)
        }
    weights = Weights(
        words.base,
        words.small,
        words.experts,
        dict(zip(names, fits[ALL].alpha, strict=True)),
        {domain: dict(zip(names, fits[domain].alpha, strict=True)) for domain in tasks},
        _story(words, models, collection, fits, found),
    )
    return Fit(weights, found, collection, [*texts.notes, *_remarks(fits, names)])


class _at:
    """Tells of which fit an error is."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, MergekitError):
            raise type(error)(f"{self.scope}: {error}") from error


def _remarks(fits: Mapping[str, Fitted], names: list[str]) -> Iterator[str]:
    """Say what a fit's figures mean, where that is easily overlooked."""
    for scope, found in fits.items():
        for i, name in enumerate(names):
            if found.facts.get("flat", [False] * len(names))[i]:
                yield (
                    f"{scope}: {name} does not move the logits on these texts; the ridge alone "
                    f"decides its weight, {found.alpha[i]:.4g}"
                )
            elif found.facts.get("at_bound", [False] * len(names))[i]:
                yield f"{scope}: the weight of {name} is held by its bound, {found.alpha[i]:.4g}"


def _story(
    words: FusePlan,
    models: Models,
    collection: Collection,
    fits: Mapping[str, Fitted],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    texts = collection.texts
    return {
        "vocabulary": collection.shape.vocabulary,
        "plan": words.text,
        "method": words.fusion.method,
        "version": __version__,
        "calibration": {
            "sha256": texts.digest(),
            "places": {domain: _counts(collection, domain) for domain in texts.domains},
            "stored": words.calibration.dtype,
            "rounding": _rounding(collection),
        },
        "diagnostics": {scope: dict(fit.facts) for scope, fit in fits.items()},
        "nats": {domain: dict(parts) for domain, parts in found.items()},
    }


def _counts(collection: Collection, domain: str) -> dict[str, int]:
    texts = collection.texts
    return {
        what: sum(stop - start for start, stop in texts.spans([domain], held=held))
        for what, held in (("fitted", False), ("held out", True))
    }


def _rounding(collection: Collection) -> float:
    """Return how far rounding moved any model's mean nats a token over all places."""
    n = collection.shape.places
    weights = collection.weights / collection.weights.sum()
    worst = 0.0
    for role in collection.files:
        said = collection.said(role).double()
        spans = Recorded(collection, [], [(0, n)])
        kept = spans.picked(role).double()
        worst = max(worst, abs(float((weights * (said - kept)).sum())))
    return worst
