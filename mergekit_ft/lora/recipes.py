"""Which adapters are merged and how, from a command line or from a small plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_ft.errors import PlanError
from mergekit_ft.lora.asked import MergeAsked
from mergekit_ft.plan import marks
from mergekit_ft.plan.reader import load
from mergekit_ft.registry import did_you_mean

KEYS = ("merge_method", "parameters", "models", "then")


@dataclass(frozen=True)
class Recipe:
    """Adapters, and what becomes of them."""

    adapters: list[str]
    asked: MergeAsked


def recipe(
    adapters: Sequence[str], plan: str | None, given: Sequence[str], asked: Mapping[str, Any]
) -> Recipe:
    """Return what the words of a command mean."""
    if plan is not None:
        return _of_plan(plan, adapters, given, asked)
    if not adapters:
        raise PlanError("name the adapters, then the folder to be made: ADAPTER ADAPTER OUT")
    parameters = dict(map(_pair, given))
    if len(parameters) < len(given):
        raise PlanError("--set names a parameter twice")
    return Recipe(list(adapters), MergeAsked(**asked, parameters=parameters))


def _pair(text: str) -> tuple[str, Any]:
    """Return the name and the value of KEY=VALUE; a value is read as in a plan."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise PlanError(f"--set {text}: write KEY=VALUE, such as --set density=0.2")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise PlanError(f"--set {text}: {value!r} cannot be read as YAML") from None


def _of_plan(
    plan: str, adapters: Sequence[str], given: Sequence[str], asked: Mapping[str, Any]
) -> Recipe:
    """Return what a plan says, whose models are adapters."""
    apart = [f"--{w}" for w, v in (("operator", asked["operator"]), ("set", given)) if v]
    apart += ["--weight"] if asked["weights"] else []
    if adapters or apart:
        raise PlanError(
            f"{plan} names the adapters and their operator: leave out "
            f"{', '.join([*adapters, *apart])}"
        )
    if asked["method"] == "svd":
        raise PlanError("--plan is for --method core or knots: it names an operator")
    method = "core" if asked["method"] == "concat" else asked["method"]
    words = _words(plan)
    entries = _entries(words, plan)
    chosen: dict[str, Any] = {**asked, "method": method, "operator": words.get("merge_method")}
    own = [dict(entry.get("parameters") or {}) for entry in entries]
    names = [entry["model"] for entry in entries]
    chosen |= {"parameters": words.get("parameters") or {}, "then": words.get("then") or ()}
    return Recipe(names, MergeAsked(**chosen, own=own))


def _words(plan: str) -> dict[str, Any]:
    text, file = load(plan)
    trees = marks.documents(text, file)
    faults = [fault for tree in trees for fault in tree.faults]
    if faults:
        raise PlanError(faults)
    words = trees[0].value
    if len(trees) > 1 or not isinstance(words, dict):
        raise PlanError(f"{plan}: must be one mapping with {', '.join(KEYS)}")
    for key in words:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS)
            raise PlanError(
                f"{plan}: '{key}' means nothing to a merge of adapters{hint} (valid: "
                f"{', '.join(KEYS)})"
            )
    return words


def _entries(words: Mapping[str, Any], plan: str) -> list[dict[str, Any]]:
    """Return the models of a plan, each a mapping with an adapter's name."""
    listed = words.get("models")
    if not isinstance(listed, list) or not listed:
        raise PlanError(f"{plan}: `models:` lists the adapters: - model: ./adapter")
    for i, entry in enumerate(listed):
        fits = isinstance(entry, dict) and isinstance(entry.get("model"), str)
        if not fits or set(entry) - {"model", "parameters"}:
            raise PlanError(f"{plan}: models[{i}] holds `model:` (an adapter) and `parameters:`")
        if not isinstance(entry.get("parameters") or {}, dict):
            raise PlanError(f"{plan}: models[{i}]: parameters is a mapping")
    return listed
