"""What a plan says of its vocabulary: `tokenizer`, `tokenizer_source`, `chat_template`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from mergekit_ft.plan.fields import shown
from mergekit_ft.plan.references import ModelReference, PlanWords, refuse
from mergekit_ft.registry import did_you_mean

if TYPE_CHECKING:
    from mergekit_ft.plan.marks import Keys
    from mergekit_ft.plan.models import Plan
    from mergekit_ft.plan.reading import Reading

UNION, BASE = "union", "base"
KINDS = ("model_token", "zero")
AUTO = "auto"
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # those that have a name
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_TOKEN = ("source", "force")
_MODEL_TOKEN = ("kind", "model", "token", "token_id")


def _reference(raw: Any) -> Any:
    """Return a model; what is wrong with it is said as it is elsewhere."""
    try:
        return ModelReference.model_validate(raw)
    except ValidationError as error:
        details = error.errors()[0]
        refuse(str(details.get("ctx", {}).get("message", "a model is a path, or PATH@REVISION")))


def _source(raw: Any) -> Any:
    if raw is None or raw in (UNION, BASE):
        return raw or UNION
    words = f"source is union, base or a model; got {shown(raw)}"
    if not isinstance(raw, str | dict | ModelReference):
        refuse(words)
    if isinstance(raw, str) and "/" not in raw and not os.path.exists(os.path.expanduser(raw)):
        refuse(f"{words}{did_you_mean(raw, (UNION, BASE))} (no folder has that name)")
    return _reference(raw)


def _token_source(raw: Any) -> Any:
    """Return a model, a token of a model, or zero."""
    if not isinstance(raw, dict) or "kind" not in raw:
        return None if raw is None else _reference(raw)
    kind = raw["kind"]
    if kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        refuse(f"kind is model_token or zero; got {shown(kind)}{hint}", ("kind",))
    return _model_token(_known(raw, _MODEL_TOKEN)) if kind == "model_token" else _zero(raw)


def _zero(raw: dict[str, Any]) -> Any:
    for key in raw:
        if key != "kind":
            refuse(f"'{key}' has no effect with kind zero; remove it", (key,))
    return Zero()


def _model_token(given: dict[str, Any]) -> Any:
    if "model" not in given:
        refuse("a model_token names its `model:`")
    named = [key for key in ("token", "token_id") if given.get(key) is not None]
    if len(named) != 1:
        refuse("a model_token names one of `token:` (text) and `token_id:` (a number)")
    token, number = given.get("token"), given.get("token_id")
    if named == ["token"] and (not isinstance(token, str) or not token):
        refuse("token is text: put it in quotes", ("token",))
    if named == ["token_id"] and (type(number) is not int or number < 0):
        refuse("token_id is a whole number from 0", ("token_id",))
    return ModelToken.model_construct(
        model=_reference(given["model"]), token=token, token_id=number
    )


def _known(raw: dict[str, Any], valid: tuple[str, ...]) -> dict[str, Any]:
    for key in raw:
        if key not in valid:
            hint = did_you_mean(str(key), valid)
            message = f"unknown key '{key}'{hint} (valid: {', '.join(valid)})"
            refuse(message, (key,), aside=True)
    return raw


def _multiple(raw: Any) -> Any:
    if raw is not None and (type(raw) is not int or raw < 1):
        refuse(f"pad_to_multiple_of is a whole number from 1; got {shown(raw)}")
    return raw


def _tokens(raw: Any) -> Any:
    if not isinstance(raw, dict | None):
        refuse("tokens maps each token to its source: `'<|im_start|>': {source: MODEL}`")
    return raw or {}


def _force(raw: Any) -> Any:
    return raw if isinstance(raw, bool) else refuse(f"force is true or false; got {shown(raw)}")


def _template(raw: Any) -> Any:
    if raw is None:
        return None
    names = (AUTO, *TEMPLATES)
    if not isinstance(raw, str):
        refuse(f"chat_template is {', '.join(names)}, or a Jinja text; got {shown(raw)}")
    if raw in names or "{" in raw:
        return raw
    hint = did_you_mean(raw, names)
    refuse(
        f"no chat template has the name {shown(raw)}{hint} (valid: {', '.join(names)}, or Jinja)"
    )


class Zero(PlanWords):
    """A row of zeros."""


class ModelToken(PlanWords):
    """The row that a model has for one of its tokens."""

    model: Any  # ModelReference
    token: str | None = None
    token_id: int | None = None

    def __str__(self) -> str:
        named = self.token if self.token is not None else f"id {self.token_id}"
        return f"{named} of {self.model}"


class TokenWords(PlanWords):
    """Where a token's row comes from, in models that lack it or, by force, in all."""

    source: Annotated[Any, BeforeValidator(_token_source)] = None  # ModelReference | ModelToken
    force: Annotated[bool, BeforeValidator(_force)] = False

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        if not isinstance(raw, dict | None):
            refuse("a token takes a mapping: `{source: MODEL, force: true}`")
        return _known(raw or {}, _TOKEN)


class TokenizerWords(PlanWords):
    """Whose vocabulary the output has, and the tokens that are told apart."""

    source: Annotated[Any, BeforeValidator(_source)] = UNION  # union, base or a ModelReference
    tokens: Annotated[dict[str, TokenWords], BeforeValidator(_tokens)] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int | None, BeforeValidator(_multiple)] = None

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, raw: Any) -> Any:
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            hint = f"; write `tokenizer_source: {raw}`, or" if isinstance(raw, str) else ":"
            refuse(f"tokenizer is a mapping{hint} `tokenizer: {{source: union}}`")
        return _known(raw, _TOKENIZER)


TokenizerSource = Annotated[Any, BeforeValidator(lambda raw: None if raw is None else _source(raw))]
ChatTemplate = Annotated[str | None, BeforeValidator(_template)]


def check_tokenizer(reading: Reading) -> None:
    """Report both ways to choose a vocabulary in one plan."""
    plan = reading.plan
    if plan and plan.tokenizer is not None and plan.tokenizer_source is not None:
        message = "tokenizer_source and tokenizer both choose the vocabulary; keep one of them"
        reading.add(("tokenizer_source",), message, key=True)


def vocabulary_words(plan: Plan) -> tuple[TokenizerWords | None, Keys]:
    """Return what a plan asks of the vocabulary, and the path of its source's words."""
    if plan.tokenizer_source is not None:
        return TokenizerWords.model_construct(source=plan.tokenizer_source), ("tokenizer_source",)
    return plan.tokenizer, ("tokenizer", "source")


def token_models(words: TokenizerWords) -> Iterator[tuple[Keys, ModelReference]]:
    """Yield each model that a token's row is taken from, and where it is named."""
    for token, said in words.tokens.items():
        path: Keys = ("tokenizer", "tokens", token, "source")
        if isinstance(said.source, ModelToken):
            yield (*path, "model"), said.source.model
        elif said.source is not None and not isinstance(said.source, Zero):
            yield path, said.source


def vocabulary_schema(model: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of these keys, given that of a model."""
    source = {"anyOf": [{"enum": [UNION, BASE, None]}, model]}
    closed: dict[str, Any] = {"type": "object", "additionalProperties": False}
    of_token = {
        "kind": {"const": "model_token"},
        "model": model,
        "token": {"type": "string"},
        "token_id": {"type": "integer", "minimum": 0},
    }
    zero = {**closed, "required": ["kind"], "properties": {"kind": {"const": "zero"}}}
    picked = {**closed, "required": ["kind", "model"], "properties": of_token}
    of_one = {"source": {"anyOf": [model, picked, zero]}, "force": {"type": "boolean"}}
    token = {**closed, "type": ["object", "null"], "properties": of_one}
    parts = {
        "source": source,
        "tokens": {"type": ["object", "null"], "additionalProperties": token},
        "pad_to_multiple_of": {"type": ["integer", "null"], "minimum": 1},
    }
    names = ", ".join((AUTO, *TEMPLATES))
    return {
        "tokenizer": {
            **closed,
            "type": ["object", "null"],
            "description": "whose vocabulary the output has; rows are aligned by token",
            "properties": parts,
        },
        "tokenizer_source": {**source, "description": "the same as tokenizer.source"},
        "chat_template": {
            "type": ["string", "null"],
            "description": f"{names}, or a Jinja text",
        },
    }
