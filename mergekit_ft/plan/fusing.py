"""What a plan of fused logits may say, key by key, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from mergekit_ft.errors import PlanError
from mergekit_ft.plan.fields import shown
from mergekit_ft.plan.methods import Method, built, made, words_of
from mergekit_ft.plan.models import Step
from mergekit_ft.plan.references import ModelReference, PlanWords, refuse

if TYPE_CHECKING:
    from mergekit_ft.fusing import Fusion

CALIBRATION = "calibration"  # a key of this plan, and of a merge plan
NEUTRAL = "neutral"  # the domain of the anchor
USUAL = "dynamic_logit_fusion"
Files = tuple[str, ...]
Stored = Literal["float16", "bfloat16", "float32"]


def _files(raw: Any, what: str = "") -> Files:
    given = [raw] if isinstance(raw, str) else raw
    if (
        not isinstance(given, list | tuple)
        or not given
        or not all(isinstance(f, str) for f in given)
    ):
        refuse(f"{what}a JSONL file, or a list of them; got {shown(raw)}")
    return tuple(given)


def _data(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return _files(raw, "data is a mapping of domains to JSONL files, or ")
    if not raw:
        refuse("data names no domain: `data: {maths: maths.jsonl}`")
    if NEUTRAL in raw:
        refuse(f"'{NEUTRAL}' is what the anchor is called; name the domain otherwise", (NEUTRAL,))
    return {str(name): _files(files, f"{name}: ") for name, files in raw.items()}


def _anchor(raw: Any) -> Any:
    return raw if isinstance(raw, bool) else _files(raw, "anchor is true, false, ")


def _experts(raw: Any) -> Any:
    if not isinstance(raw, dict) or not raw:
        refuse(
            f"experts maps a name to each model: `experts: {{maths: ./maths}}`; got {shown(raw)}"
        )
    return {str(name): model for name, model in raw.items()}


Experts = Annotated[dict[str, ModelReference], BeforeValidator(_experts)]


class CalibrationWords(PlanWords):
    """The texts by which weights are fitted."""

    data: Annotated[Any, BeforeValidator(_data)]  # files by domain; or files, whose rows name it
    anchor: Annotated[Any, BeforeValidator(_anchor)] = True  # neutral text, ours or files
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.25  # share of rows that are not fitted on
    positions: Annotated[int, Field(ge=1)] = 1024  # scored tokens that suffice of a domain
    balanced: bool = True  # whether domains count alike, however many places they hold
    rows: Literal["auto", "raw", "chat"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 1024  # tokens of a row
    seed: int = 0  # which rows are taken, and which are held out
    dtype: Stored = "float16"  # of the logits kept


class FusePlan(PlanWords):
    """Models whose logits are fused, and how their weights are found."""

    base: ModelReference  # the model that is moved
    small: ModelReference | None = None  # what the experts were tuned from; None: base
    experts: Experts
    teacher: ModelReference | None = None
    calibration: CalibrationWords
    fusion: Method = Step.model_validate(USUAL)

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """Return the plan as it was written."""
        return self._text


_EXAMPLES = {
    "base": "the model that is moved: `base: ./model`",
    "experts": "whose shifts move it: `experts: {maths: ./maths}`",
    "calibration": "what to fit by: `calibration: {data: {maths: maths.jsonl}}`",
    "data": "what to fit by: `data: {maths: maths.jsonl}`",
}


def read_fuse(plan: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[FusePlan, Fusion]:
    """Return a plan given as a file, as YAML text, or as a mapping, and its method.

    PlanError holds every fault found.
    """
    reading = words_of(plan)
    found: FusePlan | None = None
    fusion: Fusion | None = None
    if reading.words is not None:
        found = built(FusePlan, reading, _EXAMPLES)
        fusion = made(reading, "fusion", USUAL)
    if found is not None and fusion is not None:
        name = found.fusion.method
        if fusion.taught and found.teacher is None:
            reading.add(("fusion",), f"{name} so needs `teacher:`, a model to come near to")
        if found.teacher is not None and not fusion.taught:
            reading.add(("teacher",), f"{name} so takes none: teacher has no effect", key=True)
        if found.small is not None and found.small.key == found.base.key:
            reading.add(("small",), "small is the base, which it is where it is not named")
    if found is None or fusion is None or reading.faults:
        raise PlanError(reading.faults or "the plan holds nothing that can be used")
    found._text = reading.text
    return found, fusion


def calibrates(plan: Any) -> bool:
    """Say whether a merge plan asks for weights to be fitted; one that cannot be read does not."""
    try:
        words = words_of(plan).words
    except (PlanError, TypeError, ValueError):
        return False
    return words is not None and CALIBRATION in words and "merge_method" in words
