"""The JSON Schema of a plan, with every method's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_ft import registry
from mergekit_ft.plan.fields import REQUIRED, Parameter, parameters_of
from mergekit_ft.plan.models import DTYPES
from mergekit_ft.plan.tokenizers import vocabulary_schema

if TYPE_CHECKING:
    from mergekit_ft.contract import Operator

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_DTYPE: Json = {"enum": [*DTYPES, *(f"torch.{dtype}" for dtype in DTYPES), None]}
_PATH: Json = {
    "type": "object",
    "properties": {"path": _TEXT, "revision": {"type": ["string", "null"]}},
    "required": ["path"],
    "additionalProperties": False,
}
_ADAPTER: Json = {
    "description": "an adapter to put on the model: a folder, or a Hub id",
    "anyOf": [_TEXT, _PATH, {"type": "null"}],
}
_DELTA: Json = {
    "description": "a delta file to put on the model, or to take off",
    "anyOf": [
        _TEXT,
        {
            "type": "object",
            "properties": {
                "path": _TEXT,
                "scale": {"type": "number"},
                "revert": {"type": "boolean"},
                "task": {"type": ["string", "null"], "description": "of a pack"},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ],
}
_ARCHITECTURE: Json = {
    "description": "of mergekit; changes nothing: tensors are matched by name and shape",
    "type": ["string", "null"],
}
_ON_MODEL: Json = {
    "adapter": _ADAPTER,
    "lora": _ADAPTER,
    "delta": _DELTA,
    "override_architecture": _ARCHITECTURE,
}
_MODEL: Json = {
    "description": "a folder, or a Hub id with an optional @revision; +ADAPTER puts one on it",
    "anyOf": [
        _TEXT,
        {**_PATH, "properties": _PATH["properties"] | _ON_MODEL},
        {
            "type": "object",
            "properties": {"model": {"anyOf": [_TEXT, _PATH]}} | _ON_MODEL,
            "required": ["model"],
            "additionalProperties": False,
        },
    ],
}
_PREFIX: Json = {
    "description": "how names begin in this model: how they begin in the base",
    "type": ["object", "null"],
    "additionalProperties": _TEXT,
    "minProperties": 1,
}
_PARAMETERS: Json = {"type": ["object", "null"]}
_AROUND: Json = {
    "base_model": {"anyOf": [{"$ref": "#/definitions/model"}, {"type": "null"}]},
    "parameters": _PARAMETERS,
}
_LAYERS: Json = {
    "description": "[first, end] of the model's layers, from 0, the end not included",
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 2,
    "maxItems": 2,
}
_LISTS = ("models", "slices", "modules")
_SELECTORS: Json = {
    "filter": {"type": "string", "description": "case-sensitive part of the tensor's name; *: all"},
    "match": {"type": "string", "description": "glob over the whole name of the tensor"},
    "layers": {
        "description": "layer numbers in every stack, both ends included: 4..12, 4.., ..12, 4",
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": r"^([0-9]+|[0-9]+\s*\.\.\s*[0-9]*|\.\.\s*[0-9]+)$"},
        ],
    },
}


def schema() -> Json:
    """Return the JSON Schema (draft 7) of a plan."""
    from mergekit_ft.contract import Adjustment

    methods = {name: registry.method(name) for name in registry.names("operator")}
    definitions: Json = {"model": _MODEL}
    for name, method in methods.items():
        definitions |= _definitions(name, method)
    steps = [name for name, method in methods.items() if issubclass(method, Adjustment)]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "mergekit-ft plan",
        "type": "object",
        "required": ["merge_method"],
        "oneOf": [{"required": [word]} for word in _LISTS],
        "additionalProperties": False,
        "properties": _properties(list(methods), steps),
        "allOf": [_choice(name, method) for name, method in methods.items()],
        "definitions": definitions,
    }


def _properties(methods: list[str], steps: list[str]) -> Json:
    named = [{"const": name, "description": registry.summary(name)} for name in methods]
    return {
        "merge_method": {"description": "how to merge", "oneOf": named},
        **_lists(),
        "modules": {
            "description": "the same for each part of a model that has several stacks of layers",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": _closed({**_lists(), **_AROUND}, []),
        },
        "base_model": {"anyOf": [_ref("model"), {"type": "null"}]},
        "parameters": {"type": ["object", "null"]},
        "dtype": {**_DTYPE, "description": "dtype of the stored weights"},
        "out_dtype": {**_DTYPE, "description": "the same; it beats dtype"},
        "name": {"type": ["string", "null"], "description": "what to call the result"},
        "then": {
            "type": ["array", "null"],
            "description": "operators on the merged delta, in order",
            "items": {"anyOf": [{"enum": steps}, *map(_step, steps)]},
        },
        "calibration": {
            "description": "texts to fit the weights of logit_fusion by, before it merges",
            "type": ["object", "null"],
        },
        **vocabulary_schema(_ref("model")),
    }


def _lists() -> Json:
    """Return what a plan, and a module of it, merges: whole models or slices of them."""
    own = {"model": _ref("model"), "adapter": _ADAPTER, "delta": _DELTA, "parameters": _PARAMETERS}
    entry = _closed({**own, "prefix": _PREFIX}, ["model"])
    source = _closed({**own, "layer_range": _LAYERS}, ["model", "layer_range"])
    sources = {"type": "array", "minItems": 1, "items": source}
    output = _closed({"sources": sources, **_AROUND}, ["sources"])
    return {
        "models": {"type": "array", "minItems": 1, "items": entry},
        "slices": {
            "description": "layers of the output, from the first to the last",
            "type": "array",
            "minItems": 1,
            "items": output,
        },
    }


def _closed(properties: Json, required: list[str]) -> Json:
    closed: Json = {"type": "object", "additionalProperties": False, "properties": properties}
    return closed | ({"required": required} if required else {})


def _step(name: str) -> Json:
    given = {"anyOf": [_ref(f"{name}.shared"), {"type": "null"}]}
    return {
        "type": "object",
        "required": [name],
        "additionalProperties": False,
        "properties": {name: given},
    }


def _choice(name: str, method: type[Operator]) -> Json:
    """Return what holds of a plan that names this method."""
    from mergekit_ft.contract import Base

    own = {"anyOf": [_ref(f"{name}.model"), {"type": "null"}]}
    shared = {"anyOf": [_ref(f"{name}.shared"), {"type": "null"}]}
    listed: Json = {"items": {"properties": {"parameters": own}}}
    output = {"parameters": shared, "sources": listed}
    lists: Json = {"models": listed, "slices": {"items": {"properties": output}}}
    inside = {"additionalProperties": {"properties": {"parameters": shared, **lists}}}
    then: Json = {"properties": {"parameters": shared, **lists, "modules": inside}}
    if method.base is Base.REQUIRED:  # which a slice or a module may have of its own
        then["if"] = {"required": ["models"]}
        then["then"] = {"required": ["base_model"]}
    when = {"properties": {"merge_method": {"const": name}}, "required": ["merge_method"]}
    return {"if": when, "then": then}


def _definitions(name: str, method: type[Operator]) -> Json:
    """Return the parameters a method takes for all models, and for one."""
    settings: Json = {}
    inner: Json = {}
    own: list[str] = []
    for word, parameter in parameters_of(method).items():
        settings[word], more = _setting(parameter)
        inner |= more
        own += [word] if parameter.scope == "model" else []
    closed: Json = {"type": "object", "additionalProperties": False}
    return inner | {
        f"{name}.shared": {**closed, "properties": settings},
        f"{name}.model": {**closed, "properties": {word: settings[word] for word in own}},
    }


def _setting(parameter: Parameter) -> tuple[Json, Json]:
    """Return the schema of one parameter's setting, and the definitions it needs."""
    scalar = parameter.kind.json_schema(ref_template="#/definitions/{model}")
    inner = scalar.pop("$defs", {})
    about: Json = {"description": _about(parameter)}
    if parameter.default is not REQUIRED:
        about["default"] = parameter.default
    if parameter.scope == "plan":
        return about | ({"anyOf": [scalar]} if "$ref" in scalar else scalar), inner
    gradient = {"type": "array", "items": scalar, "minItems": 1}
    value = {"anyOf": [scalar, gradient]}
    entry = {
        "type": "object",
        "required": ["value"],
        "additionalProperties": False,
        "properties": {"value": value, **_SELECTORS},
    }
    entries = {"type": "array", "items": entry, "minItems": 1}
    return about | {"anyOf": [scalar, gradient, entries, entry]}, inner


def _about(parameter: Parameter) -> str:
    whose = {"model": "for each model", "tensor": "for all models", "plan": "for the whole plan"}
    return f"{parameter.description or parameter.word} ({whose[parameter.scope]})"


def _ref(name: str) -> Json:
    return {"$ref": f"#/definitions/{name}"}
