"""What a plan may say, key by key."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, model_validator

from mergekit_ft.plan.tokenizers import ChatTemplate, TokenizerSource, TokenizerWords
from mergekit_ft.plan.words import refuse
from mergekit_ft.registry import did_you_mean

DTYPES = ("float32", "float16", "bfloat16", "float64")
_SHORT = {"fp16": "float16", "half": "float16", "f16": "float16", "bf16": "bfloat16"}
_SHORT |= {"fp32": "float32", "float": "float32", "f32": "float32", "single": "float32"}
_SHORT |= {"fp64": "float64", "double": "float64", "f64": "float64"}


class _Words(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelReference(_Words):
    """A checkpoint: a folder that exists, or a Hub id with an optional revision."""

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return _split(raw)
        if isinstance(raw, dict):
            return _from_object(raw)
        return raw if isinstance(raw, cls) else refuse("a model is a path, or PATH@REVISION")

    @property
    def local(self) -> Path | None:
        """Return the file or folder, where one exists."""
        return Path(self.path) if os.path.exists(self.path) else None

    @cached_property
    def key(self) -> tuple[str, str | None]:
        """Return what two references to the same checkpoint share."""
        return (os.path.abspath(self.path) if self.local else self.path, self.revision)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class Entry(_Words):
    """One of the models and its own parameters."""

    model: ModelReference
    parameters: Parameters = {}


class Step(_Words):
    """One operator under `then:`."""

    method: str
    parameters: dict[str, Any] = {}

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


class Plan(_Words):
    """What is asked: the method, the models, and their parameters."""

    merge_method: str
    models: tuple[Entry, ...]
    base_model: ModelReference | None = None
    parameters: Parameters = {}
    dtype: Dtype = None
    out_dtype: Dtype = None
    name: str | None = None
    then: Steps = ()
    tokenizer: TokenizerWords | None = None
    tokenizer_source: TokenizerSource = None
    chat_template: ChatTemplate = None

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


def _split(text: str) -> dict[str, str | None]:
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return {"path": path, "revision": None}
    if "+" in path:
        refuse(f"'{text}': `+ADAPTER` is not supported yet (and nothing is at that path)")
    path, *revisions = path.split("@")
    if not path or len(revisions) > 1 or "" in revisions:
        refuse(f"'{text}' is not PATH or PATH@REVISION")
    if revisions and os.path.exists(path):
        refuse(f"'{path}' is local, where a revision has no effect; drop '@{revisions[0]}'")
    return {"path": path, "revision": revisions[0] if revisions else None}


def _from_object(raw: dict[str, Any]) -> Any:
    for key in ("lora", "override_architecture"):
        if raw.get(key) is not None:
            refuse(f"'{key}' is not supported yet", (key,))
    rest = {key: raw[key] for key in raw if key not in ("lora", "override_architecture")}
    unknown = [key for key in rest if key not in ("model", "path", "revision")]
    if unknown:
        hint = did_you_mean(unknown[0], ("model", "path", "revision"))
        refuse(f"unknown key '{unknown[0]}' in a model{hint}", (unknown[0],), aside=True)
    if set(rest) == {"model"}:
        inner = rest["model"]
        return _from_object(inner) if isinstance(inner, dict) else _split_text(inner, ("model",))
    if "path" not in rest or "model" in rest:
        refuse("a model is PATH@REVISION, {path, revision} or {model}")
    if not isinstance(rest["path"], str) or not rest["path"]:
        refuse("path must be text", ("path",))
    return rest | {"path": os.path.expanduser(rest["path"])}


def _split_text(raw: Any, at: tuple[str | int, ...]) -> dict[str, str | None]:
    return _split(raw) if isinstance(raw, str) else refuse("a model is a path", at)


def _mapping(raw: Any) -> Any:
    if not isinstance(raw, dict | None):
        refuse("parameters is a mapping of names to values")
    return raw or {}


def _steps(raw: Any) -> Any:
    if not isinstance(raw, list | tuple | None):
        refuse("then is a list of operators: `- lines: {beta: 0.5}`")
    return raw or ()


def _dtype(raw: Any) -> str | None:
    if raw is None:
        return None
    word = str(raw).removeprefix("torch.")
    if word in DTYPES:
        return word
    near = _SHORT.get(word.lower())
    hint = f"; did you mean '{near}'?" if near else did_you_mean(word, DTYPES)
    refuse(f"'{raw}' is not a dtype of merged weights{hint} (valid: {', '.join(DTYPES)})")


Parameters = Annotated[dict[str, Any], BeforeValidator(_mapping)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
Steps = Annotated[tuple[Step, ...], BeforeValidator(_steps)]
for _model in (Entry, Plan):
    _model.model_rebuild()
