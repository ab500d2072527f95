"""Plans that both toolkits understand, by name: every one is a method and a way to set it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.peers.families import Family
from tests.peers.peer import Plan

Write = Callable[[Family], Plan]


def plan_of(
    method: str,
    family: Family,
    models: list[dict[str, Any]],
    *,
    base: bool = True,
    **parameters: Any,
) -> Plan:
    """Return a plan over the tuned models in order, one mapping of parameters for each."""
    plan: Plan = {"merge_method": method}
    if base:
        plan["base_model"] = family.base
    plan["models"] = [
        {"model": path, "parameters": own} if own else {"model": path}
        for path, own in zip(family.tuned, models, strict=False)
    ]
    if parameters:
        plan["parameters"] = {"lambda" if k == "lambda_" else k: v for k, v in parameters.items()}
    return plan


def _linear(*models: dict[str, Any], base: bool = False, **parameters: Any) -> Write:
    return lambda f: plan_of("linear", f, list(models), base=base, **parameters)


def _on_base(method: str, *models: dict[str, Any], **parameters: Any) -> Write:
    return lambda f: plan_of(method, f, list(models), **parameters)


LINEAR: dict[str, Write] = {
    "one weight each": _linear({"weight": 0.7}, {"weight": 0.5}, {"weight": 0.1}),
    "not normalized": _linear({"weight": 0.7}, {"weight": 0.6}, normalize=False),
    "negative weight": _linear({"weight": 1.3}, {"weight": -0.4}),
    "gradients": _linear({"weight": [0.1, 0.9, 0.3]}, {"weight": [1, 0.25]}),
    "numbers as text": _linear({"weight": "3e-1"}, {"weight": "0.5"}),
    "shared weight, unlisted base joins last": _linear({}, {"weight": 0.9}, base=True, weight=0.3),
    "filters": lambda f: plan_of(
        "linear",
        f,
        [
            {"weight": [{"filter": f.words.attention, "value": 0.3}, {"value": 0.8}]},
            {"weight": [{"filter": f.words.feed_forward, "value": [0.2, 0.9]}]},
        ],
        base=False,
        weight=0.6,
    ),
    "normalize by layer and filter": lambda f: plan_of(
        "linear",
        f,
        [{"weight": 0.8}, {"weight": 0.5}],
        base=False,
        normalize=[
            {"filter": f.words.norm, "value": True},
            {"filter": f.words.attention, "value": [True, False]},
            {"value": False},
        ],
    ),
}

SLERP: dict[str, Write] = {
    "scalar": _on_base("slerp", {}, t=0.3),
    "gradient": _on_base("slerp", {}, t=[0, 0.5, 0.3, 0.7, 1]),
    "outside": _on_base("slerp", {}, t=1.4),
    "filters": lambda f: plan_of(
        "slerp",
        f,
        [{}],
        t=[
            {"filter": f.words.attention, "value": [0.1, 0.6, 0.9]},
            {"filter": f.words.feed_forward, "value": 0.25},
            {"filter": "*", "value": 0.5},
        ],
    ),
    "both models listed": lambda f: {
        **plan_of("slerp", f, [{}], t=0.6),
        "models": [{"model": f.tuned[0]}, {"model": f.base}],
    },
}

TASK_ARITHMETIC: dict[str, Write] = {
    "scalars": _on_base("task_arithmetic", {"weight": 0.4}, {"weight": 0.7}, {"weight": -0.2}),
    "normalize": _on_base("task_arithmetic", {"weight": 0.4}, {"weight": 0.7}, normalize=True),
    "lambda": _on_base("task_arithmetic", {"weight": 0.4}, {"weight": 0.7}, lambda_=1.7),
    "weights that cancel": _on_base(
        "task_arithmetic", {"weight": 0.5}, {"weight": -0.5}, normalize=True
    ),
    "gradients": _on_base(
        "task_arithmetic", {"weight": [0, 0.2, 1]}, {"weight": [0.9, 0.1]}, lambda_=[0.4, 0.9]
    ),
    "base listed too": lambda f: {
        **(plan := plan_of("task_arithmetic", f, [{}, {"weight": 0.2}], weight=0.6)),
        "models": [{"model": f.base}, *plan["models"]],
    },
    "precedence": lambda f: plan_of(
        "task_arithmetic",
        f,
        [
            {"weight": [{"filter": f.words.attention, "value": [0.2, 0.8]}]},
            {},
            {"weight": 0.15},
        ],
        weight=[{"filter": f.words.feed_forward, "value": 0.35}, {"value": [0.5, 0.6]}],
        lambda_=[{"filter": f.words.norm, "value": 0.5}],
    ),
}

TIES: dict[str, Write] = {
    "density": _on_base("ties", {"weight": 0.4, "density": 0.5}, {"weight": 0.7, "density": 0.3}),
    "no density": _on_base("ties", {"weight": 0.4}, {"weight": 0.7}, {"weight": 0.6}),
    "small density": _on_base("ties", {}, {}, {}, weight=1.0, density=0.001),
    "zero density": _on_base("ties", {"weight": 1, "density": 0.0}, {"weight": 0.5}, density=0.4),
    "not normalized": _on_base("ties", {}, {}, {}, weight=0.4, density=0.5, normalize=False),
    "rescale": _on_base("ties", {}, {}, {}, weight=0.4, density=0.25, rescale=True),
    "lambda": _on_base("ties", {}, {}, {}, weight=1.0, density=0.6, lambda_=0.8, int8_mask=True),
    "negative weight": _on_base("ties", {"weight": 1.2}, {"weight": -0.3}, density=0.5),
    "gradients": _on_base(
        "ties",
        {"weight": [0.1, 0.9], "density": [0.2, 0.8, 1.0]},
        {"weight": 0.5, "density": [0.9, 0.4]},
        lambda_=[0.5, 1.1],
        normalize=[True, False],
        rescale=[False, True],
    ),
    "filters and precedence": lambda f: plan_of(
        "ties",
        f,
        [
            {
                "weight": [{"filter": f.words.attention, "value": [0.2, 0.8]}, {"value": 0.6}],
                "density": [{"filter": f.words.feed_forward, "value": 0.33}],
            },
            {"density": [0.7, 0.3]},
            {"weight": 0.9},
        ],
        weight=0.45,
        density=[{"filter": f.words.norm, "value": 1.0}, {"value": 0.55}],
        normalize=[{"filter": f.words.attention, "value": False}],
        lambda_=0.9,
    ),
}

PLANS: dict[str, dict[str, Write]] = {
    "linear": LINEAR,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
}
