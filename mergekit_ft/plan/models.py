"""What a plan may say, key by key."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from mergekit_ft.plan.entries import Entry, Module, OutputSlice, Parameters
from mergekit_ft.plan.references import ModelReference, PlanWords, refuse
from mergekit_ft.plan.tokenizers import ChatTemplate, TokenizerSource, TokenizerWords
from mergekit_ft.registry import did_you_mean

DTYPES = ("float32", "float16", "bfloat16", "float64")
_SHORT = {"fp16": "float16", "half": "float16", "f16": "float16", "bf16": "bfloat16"}
_SHORT |= {"fp32": "float32", "float": "float32", "f32": "float32", "single": "float32"}
_SHORT |= {"fp64": "float64", "double": "float64", "f64": "float64"}


class Step(PlanWords):
    """One operator under `then:`."""

    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"method": raw}
        if not isinstance(raw, dict) or len(raw) != 1:
            refuse("each item under then is one method: `- lines: {beta: 0.5}` or `- lines`")
        ((method, given),) = raw.items()
        if not isinstance(given, dict | None):
            refuse(f"{method} takes a mapping of parameters", (method,))
        return {"method": method, "parameters": given or {}}


class Plan(PlanWords):
    """What is asked: the method, the models, and their parameters."""

    merge_method: str
    models: tuple[Entry, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    modules: Modules = Field(default_factory=dict)
    base_model: ModelReference | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype = None
    out_dtype: Dtype = None
    name: str | None = None
    then: Steps = ()
    tokenizer: TokenizerWords | None = None
    tokenizer_source: TokenizerSource = None
    chat_template: ChatTemplate = None
    calibration: Calibration = None

    _text: str = PrivateAttr("")
    _file: str = PrivateAttr("plan")

    def came_from(self, text: str, file: str) -> None:
        """Note where the plan was read."""
        self._text, self._file = text, file

    @property
    def text(self) -> str:
        """Return the plan as it was written."""
        return self._text

    @property
    def file(self) -> str:
        """Return the file it was read from, or "plan"."""
        return self._file

    @property
    def stored_dtype(self) -> str | None:
        """Return the dtype of the output; None: each tensor keeps the base's."""
        return self.out_dtype or self.dtype


def _steps(raw: Any) -> Any:
    if not isinstance(raw, list | tuple | None):
        refuse("then is a list of operators: `- lines: {beta: 0.5}`")
    return raw or ()


def _modules(raw: Any) -> Any:
    if not isinstance(raw, dict | None):
        refuse("modules maps each module to its `models:` or `slices:`")
    return raw or {}


def _dtype(raw: Any) -> str | None:
    if raw is None:
        return None
    word = str(raw).removeprefix("torch.")
    if word in DTYPES:
        return word
    near = _SHORT.get(word.lower())
    hint = f"; did you mean '{near}'?" if near else did_you_mean(word, DTYPES)
    refuse(f"'{raw}' is not a dtype of merged weights{hint} (valid: {', '.join(DTYPES)})")


def _calibration(raw: Any) -> None:
    """Refuse it: what carries a plan out knows no texts; `fusion.merge` fits the weights first."""
    if raw is not None:
        refuse(
            "calibration is fitted before a merge, by `mergekit-ft merge` of a plan of one stage "
            "or by mergekit_ft.fusion.merge; here weights must stand, as `mergekit-ft fuse fit` "
            "finds them"
        )


Calibration = Annotated[None, BeforeValidator(_calibration)]
Modules = Annotated[dict[str, Module], BeforeValidator(_modules)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
Steps = Annotated[tuple[Step, ...], BeforeValidator(_steps)]
Plan.model_rebuild()
