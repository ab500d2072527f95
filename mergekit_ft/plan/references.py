"""How a plan names a model: a path or Hub id, its revision, and an adapter to put on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from mergekit_ft.registry import did_you_mean

Key = tuple[str | None, ...]  # what two references to the same checkpoint share
At = tuple[str | int, ...]
Words = dict[str, Any]
_ADAPTER = ("adapter", "lora")  # ours and mergekit's word
_DELTA = "delta"
_OF_DELTA = ("path", "scale", "revert", "task")
_ARCHITECTURE = "override_architecture"


def refuse(message: str, at: At = (), *, aside: bool = False) -> NoReturn:
    """Refuse a value of a plan in our own words; `at` is the path below it.

    `aside` says that mergekit 0.1.5 reads it without effect, so that only it is set aside.
    """
    details = {"message": message, "at": at, "aside": aside}
    raise PydanticCustomError("plan", "{message}", details)


class PlanWords(BaseModel):
    """Words of a plan: each is known, none changes, and a number is finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdapterReference(PlanWords):
    """An adapter: a folder that exists, or a Hub id with an optional revision."""

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        return raw if isinstance(raw, cls) else _adapter(raw)

    @property
    def key(self) -> Key:
        """Return what two references to the same adapter share."""
        return (_place(self.path), self.revision)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class DeltaReference(PlanWords):
    """A delta file, how strongly it is put on, or that it is taken off."""

    path: str
    scale: float = 1.0
    revert: bool = False
    task: str | None = None  # of a pack

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        return raw if isinstance(raw, cls) else _delta(raw)

    @property
    def key(self) -> Key:
        """Return what two references to the same delta share."""
        return (_place(self.path), str(self.scale), str(self.revert), self.task)

    def __str__(self) -> str:
        named = self.path if self.task is None else f"{self.path}:{self.task}"
        return named if self.scale == 1.0 else f"{self.scale:g}*{named}"


class ModelReference(PlanWords):
    """A checkpoint: something that exists, or a Hub id; its revision, and what is put on it."""

    path: str
    revision: str | None = None
    adapter: AdapterReference | None = None
    delta: DeltaReference | None = None
    override_architecture: str | None = None  # mergekit's; here tensors match by name

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        return raw if isinstance(raw, cls) else _model(raw)

    @property
    def local(self) -> Path | None:
        """Return the file or folder, where one exists."""
        return Path(self.path) if os.path.exists(self.path) else None

    @property
    def bare(self) -> ModelReference:
        """Return the model without what is put on it."""
        return ModelReference(path=self.path, revision=self.revision)

    @cached_property
    def key(self) -> Key:
        """Return what two references to the same checkpoint share."""
        mine = (_place(self.path), self.revision)
        on = self.adapter or self.delta
        return (*mine, *on.key) if on is not None else mine

    def __str__(self) -> str:
        mine = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.delta is not None:
            return f"{mine}{'-' if self.delta.revert else '+'}{self.delta}"
        return f"{mine}+{self.adapter}" if self.adapter is not None else mine


class Named(PlanWords):
    """An item that names one model, its adapter beside it or with it."""

    model: ModelReference
    adapter: AdapterReference | None = None  # said again by `model`
    delta: DeltaReference | None = None  # said again by `model`

    @model_validator(mode="before")
    @classmethod
    def _with_what_is_on_it(cls, raw: Any) -> Any:
        given = [key for key in _ON_IT if isinstance(raw, dict) and raw.get(key) is not None]
        if not given or raw.get("model") is None:
            return raw
        model = raw["model"]
        words = dict(model) if isinstance(model, ModelReference) else _below(_model, model, "model")
        for key in given:
            found = _below(_ON_IT[key], raw[key], key)
            if words.get(key) not in (None, found):
                article = "an" if key == "adapter" else "a"
                refuse(f"the model has {article} {key} already; name one of the two", (key,))
            words, raw = words | {key: found}, raw | {key: found}
        _refuse_both(words, given[-1])
        return raw | {"model": words}


def _refuse_both(words: Words, key: str) -> None:
    """Refuse an adapter and a delta on one model: which is first would matter."""
    if words.get("adapter") is not None and words.get(_DELTA) is not None:
        refuse("a model takes an adapter or a delta, not both; merge one of them first", (key,))


def _delta(raw: Any) -> Words:
    """Read a delta: PATH or {path, scale, revert}."""
    if isinstance(raw, DeltaReference):
        return dict(raw)
    if isinstance(raw, str) and raw:
        return {"path": os.path.expanduser(raw)}
    if not isinstance(raw, dict):
        refuse("a delta is a file's PATH, or {path, scale}")
    _refuse_unknown(raw, _OF_DELTA, _OF_DELTA)
    if not isinstance(raw.get("path"), str) or not raw["path"]:
        refuse("path must be text", ("path",))
    scale, revert = raw.get("scale", 1.0), raw.get("revert", False)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        refuse("scale must be a number", ("scale",))
    if not isinstance(revert, bool):
        refuse("revert is true or false", ("revert",))
    if revert and scale != 1.0:
        refuse("a delta is taken off whole: scale has no effect with revert", ("scale",))
    task = raw.get("task")
    if not isinstance(task, str | None) or task == "":
        refuse("task is the name of one of the pack's tasks", ("task",))
    words = {"scale": float(scale), "revert": revert, "task": task}
    return {"path": os.path.expanduser(raw["path"]), **words}


def _below(read: Any, raw: Any, key: str) -> Any:
    """Read a value, its place told from its holder."""
    try:
        return read(raw)
    except PydanticCustomError as error:
        context = error.context or {}
        refuse(context["message"], (key, *context["at"]), aside=context["aside"])


def _place(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path


def _model(raw: Any) -> Words:
    if isinstance(raw, str):
        return _split(raw)
    if not isinstance(raw, dict):
        refuse("a model is a path, or PATH@REVISION")
    return _from_object(raw)


def _adapter(raw: Any) -> Words:
    """Read an adapter: PATH, PATH@REVISION or {path, revision}."""
    if isinstance(raw, AdapterReference):
        return dict(raw)
    if isinstance(raw, str):
        return _part(raw)
    if not isinstance(raw, dict):
        refuse("an adapter is PATH, PATH@REVISION or {path, revision}")
    return _from_path(raw)


_ON_IT = {"adapter": _adapter, "delta": _delta}


def _split(text: str) -> Words:
    """Read PATH[@REVISION][+ADAPTER[@REVISION]]; what exists is a path, whatever it holds."""
    if os.path.exists(os.path.expanduser(text)) or "+" not in text:
        return _part(text)
    cut = _cut(text, [i for i, letter in enumerate(text) if letter == "+"])
    model, adapter = text[:cut], text[cut + 1 :]
    if not model or not adapter:
        refuse(f"'{text}' is not MODEL+ADAPTER")
    return _part(model) | {"adapter": _part(adapter)}


def _cut(text: str, places: list[int]) -> int:
    """Return where a model ends and its adapter begins: where both exist, one does, or only."""
    model = {i for i in places if _exists(text[:i])}
    adapter = {i for i in places if _exists(text[i + 1 :])}
    for fitting in (model & adapter, model, adapter, set(places)):
        if len(fitting) == 1:
            return fitting.pop()
        if fitting:
            break
    refuse(f"'{text}' can be cut at more than one '+'; write the adapter under `adapter:`")


def _exists(text: str) -> bool:
    return bool(text) and os.path.exists(os.path.expanduser(text))


def _part(text: str) -> Words:
    """Read PATH or PATH@REVISION."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return {"path": path, "revision": None}
    path, *revisions = path.split("@")
    if not path or len(revisions) > 1 or "" in revisions:
        refuse(f"'{text}' is not PATH or PATH@REVISION")
    if revisions and os.path.exists(path):
        refuse(f"'{path}' is local, where a revision has no effect; drop '@{revisions[0]}'")
    return {"path": path, "revision": revisions[0] if revisions else None}


def _from_object(raw: Words) -> Words:
    """Read {path, revision} or {model}, either with an adapter or an architecture."""
    given = [key for key in _ADAPTER if raw.get(key) is not None]
    if len(given) > 1:
        refuse("'adapter' and 'lora' are one thing; give one", ("lora",))
    rest = {key: raw[key] for key in raw if key not in (*_ADAPTER, _DELTA, _ARCHITECTURE)}
    valid = (*_ADAPTER, _DELTA, "model", "path", "revision", _ARCHITECTURE)
    _refuse_unknown(rest, ("model", "path", "revision"), valid)
    if ("path" not in rest and set(rest) != {"model"}) or {"path", "model"} <= set(rest):
        refuse("a model is PATH@REVISION, {path, revision} or {model}")
    words = _from_path(rest) if "path" in rest else _below(_inner, rest["model"], "model")
    words |= _architecture(raw)
    if raw.get(_DELTA) is not None:
        if words.get(_DELTA) is not None:
            refuse("the model has a delta already; name one of the two", (_DELTA,))
        words |= {_DELTA: _below(_delta, raw[_DELTA], _DELTA)}
    if given:
        if words.get("adapter") is not None:
            refuse("the model has an adapter already; name one of the two", (given[0],))
        words |= {"adapter": _below(_adapter, raw[given[0]], given[0])}
    _refuse_both(words, given[0] if given else _DELTA)
    return words


def _architecture(raw: Words) -> Words:
    named = raw.get(_ARCHITECTURE)
    if not isinstance(named, str | None):
        refuse(f"{_ARCHITECTURE} must be text", (_ARCHITECTURE,))
    return {} if named is None else {_ARCHITECTURE: named}


def _inner(raw: Any) -> Words:
    if isinstance(raw, dict):
        return _from_object(raw)
    return _split(raw) if isinstance(raw, str) else refuse("a model is a path")


def _from_path(raw: Words) -> Words:
    _refuse_unknown(raw, ("path", "revision"), ("path", "revision"))
    if not isinstance(raw.get("path"), str) or not raw["path"]:
        refuse("path must be text", ("path",))
    return raw | {"path": os.path.expanduser(raw["path"])}


def _refuse_unknown(raw: Words, known: Iterable[str], valid: Iterable[str]) -> None:
    unknown = [key for key in raw if key not in known]
    if unknown:
        hint = did_you_mean(unknown[0], valid)
        refuse(f"unknown key '{unknown[0]}' in a model{hint}", (unknown[0],), aside=True)
