"""A plan's tree -> its models, with every misfit named and set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mergekit_ft.errors import PlanError
from mergekit_ft.plan.entries import Entry, InputSlice, Module, OutputSlice
from mergekit_ft.plan.fields import parameters_of, shown
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.models import Plan
from mergekit_ft.registry import did_you_mean, nearest

if TYPE_CHECKING:
    from mergekit_ft.plan.reading import Reading

_TEXTS = ("merge_method", "base_model", "dtype", "out_dtype", "name")
_LISTS = ("models", "slices", "modules")  # of which a plan has one
_OF_NAMED = [("model",), ("adapter",), ("delta",), ("base_model",)]
_REQUIRED = ("model", "layer_range", "sources")
_PARAMETERS = {"weight", "density", "normalize", "rescale", "lambda", "int8_mask", "t", "gamma"}
_PARAMETERS |= {"epsilon", "scale", "filter_wise", "normalize_weights", "select_topk", "max_iter"}


def build(tree: Any, reading: Reading) -> None:
    """Set the reading's plan to what is left of a tree after its faults."""
    if not isinstance(tree, dict):
        reading.add((), f"a plan is a mapping of keys to values; got {shown(tree)}")
        return
    _as_written(tree, reading)
    _whole(tree, reading)
    told: set[str] = set()
    while reading.plan is None:
        try:
            reading.plan = Plan.model_validate(tree)
        except ValidationError as error:
            for details in reversed(error.errors()):  # the last first, for lists shrink
                _set_aside(details, tree, reading, told)


def _as_written(tree: dict[str, Any], reading: Reading) -> None:
    """Give texts back their spelling: a name of 007 is no number."""
    named = ("base_model", "model", "adapter", "delta")
    for path, mark in reading.marks.items():
        texts = path in [(key,) for key in _TEXTS] or (
            "parameters" not in path
            and path
            and path[-1] not in ("scale", "revert")
            and (path[-1] in named or path[-2:-1] in _OF_NAMED)
        )
        if texts and mark.text is not None:
            holder = _at(path[:-1], tree)
            holder[path[-1]] = mark.text if _is_number(holder[path[-1]]) else holder[path[-1]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _whole(tree: dict[str, Any], reading: Reading) -> None:
    """Name the keys that every plan has, where they are missing, and those of which it has one."""
    if tree.get("merge_method") in (None, ""):
        message = "missing key 'merge_method': say how to merge, e.g. `merge_method: linear`"
        reading.add(("merge_method",), message)
        tree["merge_method"] = ""
    given = [key for key in _LISTS if tree.get(key) not in (None, [], {})]
    for key in given[1:]:
        message = f"a plan has one of models, slices and modules; {given[0]} is given as well"
        reading.add((key,), message, key=True)
    for key in _LISTS:
        if given and tree.get(key) in ([], {}):
            reading.add(
                (key,), f"'{key}' is empty, without effect; remove it", key=True, aside=(key,)
            )
    if not given:
        reading.add(("models",), "missing key 'models': a list of `- model: PATH`")
        reading.torn.add("models")
    for key in _LISTS:
        if key not in given[:1] and key in tree:
            tree[key] = {} if key == "modules" else []


def _set_aside(
    details: ErrorDetails, tree: dict[str, Any], reading: Reading, told: set[str]
) -> None:
    """Report one of pydantic's errors and take the node it is about out of the tree."""
    path = tuple(details["loc"])
    context = details.get("ctx", {}) if details["type"] == "plan" else {}
    below, within = context.get("at", ()), context.get("aside", False)
    label = f"{reading.marks.label(path[:-1])}.{path[-1]}"
    if label not in told:  # what was set aside before is missing now
        message = _message(details, path, tree)
        at_key = details["type"] == "extra_forbidden" or bool(below)
        idle = (*path, *below) if within or _is_idle(details, path, tree) else None
        reading.add((*path, *below), message, key=at_key, aside=idle)
    told.add(label)
    if details["type"] == "extra_forbidden":  # `mdoel:` is no second fault for want of `model:`
        told.update(
            f"{label.rpartition('.')[0]}.{near}" for near in nearest(str(path[-1]), _REQUIRED)
        )
    node = path[:-1] if details["type"] == "missing" else _within((*path, *below), tree)
    if not within:
        node = node[: len(path)]
    if details["type"] != "extra_forbidden" and not within:
        reading.torn.add(reading.marks.label(node))
    _remove(node, tree, reading)


def _is_idle(details: ErrorDetails, path: Keys, tree: dict[str, Any]) -> bool:
    """Say whether mergekit reads over a key, and the plan is whole without it."""
    if details["type"] != "extra_forbidden":
        return False
    spelt = nearest(str(path[-1]), _REQUIRED) if len(path) > 1 else []
    return all(word in _at(path[:-1], tree) for word in spelt)


def _at(path: Keys, tree: Any) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def _within(path: Keys, tree: Any) -> Keys:
    """Return the part of a path that exists."""
    for n, step in enumerate(path):
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return path[:n]
    return path


def _remove(path: Keys, tree: dict[str, Any], reading: Reading) -> None:
    holder = _at(path[:-1], tree)
    if path == ("models",) or path == ("merge_method",):
        holder[path[-1]] = [] if path == ("models",) else ""
        return
    del holder[path[-1]]
    reading.marks.remove(path)


def _message(details: ErrorDetails, path: Keys, tree: dict[str, Any]) -> str:
    kind, key = details["type"], str(path[-1])
    if kind == "extra_forbidden":
        return _unknown(key, path, tree)
    if kind == "plan":
        return str(details["ctx"]["message"])
    if kind == "missing":
        return f"missing key '{key}': write `{_EXAMPLES[key]}`"
    if key in _EXAMPLES and isinstance(path[-1], str) and kind not in ("string_type",):
        return f"{key} is a list: write `{_EXAMPLES[key]}` for each"
    if kind in ("model_type", "model_attributes_type"):
        return f"{_WRITTEN[_kind(path)]}; got {shown(details['input'])}"
    return f"{key} must be text; got {shown(details['input'])}"


_EXAMPLES = {
    "models": "- model: PATH",
    "slices": "- sources: [{model: PATH, layer_range: [0, 8]}]",
    "sources": "- {model: PATH, layer_range: [0, 8]}",
    "model": "- model: PATH",
    "layer_range": "layer_range: [0, 8]",
}
_WRITTEN: dict[type[BaseModel], str] = {
    Entry: "a model is written `- model: PATH`",
    InputSlice: "a source is written `- {model: PATH, layer_range: [0, 8]}`",
    OutputSlice: f"an output slice is written `{_EXAMPLES['slices']}`",
    Module: "a module has `models:` or `slices:`",
}


def _kind(path: Keys) -> type[BaseModel]:
    """Return what a plan has at a path."""
    kinds: dict[str, type[BaseModel]] = {"models": Entry, "slices": OutputSlice}
    kinds |= {"sources": InputSlice, "modules": Module}
    words = [word for word in path[:-1] if word in kinds] if len(path) > 1 else []
    return kinds[str(words[-1])] if words else Plan


def _unknown(key: str, path: Keys, tree: dict[str, Any]) -> str:
    """Say what is wrong with a key that no plan has, and what would do."""
    kind = _kind(path)
    valid = list(kind.model_fields)
    if key == "layer_range" and kind is Entry:
        return "'layer_range' has no effect under models, which merge whole; write `slices:`"
    if key == "residual_weight":
        return "'residual_weight' never had an effect in mergekit, and has no meaning; remove it"
    if key in _PARAMETERS or key in _method_words(tree):
        return f"unknown key '{key}': it is a parameter and belongs under `parameters:`"
    if key == "seed":
        return (
            "unknown key 'seed': a method that draws at random takes it under `parameters:`, and "
            f"{tree.get('merge_method') or 'this one'} draws nothing"
        )
    hint = did_you_mean(key, [word for word in valid if word != "modules"])  # before it, models
    hint = hint or did_you_mean(key, valid)
    return f"unknown key '{key}'{hint} (valid: {', '.join(valid)})"


def _method_words(tree: dict[str, Any]) -> set[str]:
    from mergekit_ft import registry

    try:
        return set(parameters_of(registry.method(str(tree.get("merge_method")))))
    except PlanError:
        return set()
