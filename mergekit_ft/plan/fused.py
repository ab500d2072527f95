"""What the words of fused models may say, key by key, and what is wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PrivateAttr

from mergekit_ft.errors import PlanError
from mergekit_ft.plan.fusing import Experts
from mergekit_ft.plan.methods import MethodsReading, built, words_of
from mergekit_ft.plan.references import ModelReference, PlanWords, refuse
from mergekit_ft.registry import did_you_mean

Stored = Literal["float32", "bfloat16", "float16"]
USUAL = (0.0, 2.0)  # the paper's range
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def _bounds(raw: Any) -> Any:
    """Return bounds: two numbers, or a mapping of experts to two numbers."""
    if isinstance(raw, dict):
        return {str(name): _bounds(pair) for name, pair in raw.items()}
    fine = isinstance(raw, list | tuple) and len(raw) == 2
    if not fine or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in raw):
        refuse(f"bounds are two numbers, as in [0, 2], or a mapping of experts to them; got {raw}")
    low, high = map(float, raw)
    if not 0 <= low < high < float("inf"):
        refuse(
            f"bounds {low:g} to {high:g}: the search needs 0 <= low < high; away from an expert is "
            "as far, by KL, as towards it"
        )
    return (low, high)


def _device(raw: Any) -> Any:
    if not isinstance(raw, str) or not _DEVICE.fullmatch(raw):
        refuse(f"no device is called {raw!r}; use cpu, cuda, cuda:N, mps or auto")
    return raw


Device = Annotated[str, BeforeValidator(_device)]


class SearchWords(PlanWords):
    """How a factor is found at each step."""

    how: Literal["bracket", "grid"] = "bracket"
    bounds: Annotated[Any, BeforeValidator(_bounds)] = USUAL  # of all experts, or of each

    def of(self, name: str) -> tuple[float, float]:
        """Return the bounds of one expert."""
        found = self.bounds.get(name, USUAL) if isinstance(self.bounds, dict) else self.bounds
        return (float(found[0]), float(found[1]))


class FusedPlan(PlanWords):
    """Models that speak as one."""

    base: ModelReference  # the model that is moved
    small: ModelReference | None = None  # what the experts were tuned from; None: base
    experts: Experts
    alpha: dict[str, float] | None = None  # factors that stay; None: they are searched each step
    search: SearchWords | None = None
    tokens: dict[str, str] | None = None  # of base's tokens, what small and experts call them
    devices: dict[str, Device] | None = None  # of base, small, or an expert
    dtypes: dict[str, Stored] | None = None

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """Return the words as they were written."""
        return self._text


_EXAMPLES = {
    "base": "the model that is moved: `base: ./large`",
    "experts": "whose shifts move it: `experts: {maths: ./maths}`",
}


def read_fused(plan: str | os.PathLike[str] | Mapping[str, Any]) -> FusedPlan:
    """Return fused models given as a file, as YAML text, or as a mapping.

    PlanError holds every fault found.
    """
    reading = words_of(plan)
    found: FusedPlan | None = None
    if reading.words is not None:
        found = built(FusedPlan, reading, _EXAMPLES)
    if found is not None:
        _check(found, reading)
    if found is None or reading.faults:
        raise PlanError(reading.faults or "the plan holds nothing that can be used")
    found._text = reading.text
    return found


def _check(plan: FusedPlan, reading: MethodsReading) -> None:
    """Add what does not go together."""
    names = list(plan.experts)
    if plan.alpha is not None and plan.search is not None:
        reading.add(("search",), "search has no effect: alpha says the factors", key=True)
    if plan.alpha is not None:
        _check_names("alpha", plan.alpha, names, reading)
        for name in names:
            if name not in plan.alpha:
                reading.add(("alpha",), f"alpha says no factor of '{name}'")
    if plan.search is not None and isinstance(plan.search.bounds, dict):
        _check_names("search", plan.search.bounds, names, reading, "bounds")
    if plan.small is not None and plan.small.key == plan.base.key:
        reading.add(("small",), "small is the base, which it is where it is not named")
    roles = ["base", *(["small"] if plan.small is not None else [])]
    for word in ("devices", "dtypes"):
        given = getattr(plan, word) or {}
        _check_names(word, given, [*roles, *names], reading)
        for name in {*given} & {*roles} & {*names}:
            told = f"{word}: '{name}' is an expert and {name} itself; call the expert otherwise"
            reading.add((word, name), told, key=True)


def _check_names(
    word: str, given: Mapping[str, Any], names: list[str], reading: MethodsReading, *inner: str
) -> None:
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names)
            told = f"{word}: '{name}' is none of the models{hint} (there are: {', '.join(names)})"
            reading.add((word, *inner, name), told, key=True)


def is_fused(plan: Any) -> bool:
    """Say whether a plan is of fused models; one that cannot be read is not."""
    try:
        words = words_of(plan).words
    except (PlanError, TypeError, ValueError):
        return False
    return words is not None and "experts" in words and "merge_method" not in words
