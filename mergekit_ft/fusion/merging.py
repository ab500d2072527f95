"""A merge plan with `calibration:` -> weights, fitted -> the merge, verified and written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.engine import Result
from mergekit_ft.errors import Fault, PlanError, WriteError
from mergekit_ft.fusing import Fusion
from mergekit_ft.fusion.baking import baked, require_alike
from mergekit_ft.fusion.collecting import open_models
from mergekit_ft.fusion.fitting import fitted, references
from mergekit_ft.fusion.recording import Shape
from mergekit_ft.fusion.texts import read_texts
from mergekit_ft.fusion.weights import Weights
from mergekit_ft.models.opening import quiet
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.plan import ModelReference, read
from mergekit_ft.plan.fusing import CALIBRATION, FusePlan, read_fuse
from mergekit_ft.plan.methods import words_of
from mergekit_ft.plan.models import Plan

METHOD = "logit_fusion"
TAKEN = ("merge_method", "base_model", "models")  # words that become the fit's
KEPT = ("dtype", "out_dtype", "then", "chat_template")  # words that stay the merge's
IN_CALIBRATION = ("fusion", "teacher")  # words of a fit that stand under `calibration:` here

PlanLike = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Calibrated:
    """A merge whose weights are to be fitted."""

    words: FusePlan
    fusion: Fusion
    kept: Mapping[str, Any]  # of the merge's own words
    plain: Mapping[str, Any]  # the merge with weights of 1


def read_calibrated(plan: PlanLike) -> Calibrated:
    """Return what a merge plan with `calibration:` asks for. PlanError holds every fault found."""
    reading = words_of(plan)
    raw = dict(reading.words or {})
    given = raw.pop(CALIBRATION, None)
    if raw.get("merge_method") != METHOD:
        told = f"{CALIBRATION} finds the weights of `merge_method: {METHOD}` alone"
        reading.add((CALIBRATION,), told, key=True)
    known = Plan.model_fields.keys() - {*TAKEN, *KEPT}
    for key in (key for key in raw if key in known):
        told = f"{key} cannot stand beside {CALIBRATION}, which fits weights of whole models"
        reading.add((key,), told, key=True)
    entries = [_entry(entry) for entry in _list(raw.get("models"))]
    for i, (_, parameters) in enumerate(entries):
        if parameters:
            told = f"{CALIBRATION} finds the weight; a model has no parameters beside it"
            reading.add(("models", i, "parameters"), told, key=True)
    kept = {key: raw[key] for key in KEPT if key in raw}
    plain = {key: value for key, value in raw.items() if key not in known}
    plain["models"] = [{"model": model, "parameters": {"weight": 1.0}} for model, _ in entries]
    faults = [*reading.faults, *read(plain).faults]
    try:
        words, fusion = read_fuse(_fuse_words(raw, entries, given))
    except PlanError as error:
        raise PlanError(_placed([*faults, *error.faults], reading.file)) from None
    if faults:
        raise PlanError(_placed(faults, reading.file))
    return Calibrated(words, fusion, kept, plain)


def _list(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else []


def _entry(raw: Any) -> tuple[Any, Any]:
    """Return a model's reference and its parameters."""
    if not isinstance(raw, Mapping):
        return raw, None
    rest = {key: value for key, value in raw.items() if key not in ("model", "parameters")}
    model = raw.get("model")
    return (model if not rest else {"model": model, **rest}), raw.get("parameters")


def _fuse_words(raw: Mapping[str, Any], entries: list[Any], given: Any) -> dict[str, Any]:
    """Return the plan of the fit."""
    experts: dict[str, Any] = {}
    for model, _ in entries:
        try:
            experts[str(ModelReference.model_validate(model))] = model
        except ValueError:  # told by the merge's own reading
            experts[str(model)] = model
    inside = dict(given) if isinstance(given, Mapping) else {}
    beside = {key: inside.pop(key) for key in IN_CALIBRATION if key in inside}
    calibration = inside if isinstance(given, Mapping) else given
    base = {"base": raw["base_model"]} if "base_model" in raw else {}
    return {**base, "experts": experts, CALIBRATION: calibration, **beside}


def _placed(faults: list[Fault], file: str) -> list[Fault]:
    """Return each fault once, said of the file that the plan stands in."""
    found: dict[str, Fault] = {}
    for fault in faults:
        found.setdefault(fault.message, Fault(fault.message, file, fault.line, fault.column))
    return list(found.values())


def merge(
    plan: PlanLike,
    out: str | os.PathLike[str],
    *,
    refine: bool = True,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Fit the weights that a merge plan's `calibration:` asks for, and merge by them.

    The plan beside the output, and in its receipt, holds the weights, so that it can be carried out
    and verified without calibrating again. Options are fields of `Options`.
    """
    chosen, to, watcher = Options(**options), Path(out), progress or Unwatched()
    asked = read_calibrated(plan)
    if os.path.lexists(to) and not chosen.overwrite:
        raise WriteError(f"{to} exists; give --overwrite, or another name")
    require_alike(_unfitted(asked.words), chosen)
    work = to.with_name(to.name + ".work") if cache is None else Path(cache)
    found = fitted(asked.words, asked.fusion, work, chosen, watcher)
    with quiet():
        made = baked(found.weights, to, None, refine, work, chosen, watcher, asked.kept)
    if cache is None:
        shutil.rmtree(work)
    notes = [*found.notes, *made.notes]
    return Result(**(vars(made.result) | {"notes": list(dict.fromkeys(notes))}))


def _unfitted(words: FusePlan) -> Weights:
    return Weights(words.base, words.small, words.experts, dict.fromkeys(words.experts, 1.0))


def needs(plan: PlanLike, options: Options) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return what the calibration of a plan will take, and its merge with weights of 1."""
    asked = read_calibrated(plan)
    with quiet():
        models = open_models(references(asked.words), options.offline)
        texts = read_texts(asked.words.calibration, models.tokenizer)
    shape = Shape(texts.places, models.vocabulary, getattr(torch, asked.words.calibration.dtype))
    held = sum(part.stop - part.start for part in texts.parts if part.held)
    found = {
        "models": len(models.references),
        "domains": texts.domains,
        "places": texts.places,
        "held_out": held,
        "bytes": shape.nbytes * len(models.references),
        "notes": list(texts.notes),
    }
    return found, asked.plain
