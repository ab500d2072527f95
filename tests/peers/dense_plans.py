"""Plans over the methods that take every element: along arcs, by angles, by distance, or as is."""

from __future__ import annotations

from typing import Any

from tests.peers.plans import Write, plan_of


def _of(method: str, *models: dict[str, Any], base: bool = True, **parameters: Any) -> Write:
    return lambda f: plan_of(method, f, list(models), base=base, **parameters)


NUSLERP: dict[str, Write] = {
    "task vectors": _of("nuslerp", {"weight": 0.6}, {"weight": 0.3}),
    "models": _of("nuslerp", {"weight": 0.6}, {"weight": 0.3}, base=False),
    "outside": _of("nuslerp", {"weight": 1.2}, {"weight": -0.4}),
    "weights that cancel": _of("nuslerp", {"weight": 0.5}, {"weight": -0.5}),
    "rows": _of("nuslerp", {"weight": 0.6}, {"weight": 0.3}, nuslerp_flatten=False),
    "columns": _of(
        "nuslerp", {}, {}, weight=1.0, nuslerp_flatten=False, nuslerp_row_wise=True, base=False
    ),
    "gradients": _of("nuslerp", {"weight": [0.1, 0.9]}, {"weight": 0.5}, base=False),
    "filters": lambda f: plan_of(
        "nuslerp",
        f,
        [{"weight": [{"filter": f.words.attention, "value": [0.2, 0.8]}]}, {}],
        weight=0.6,
        nuslerp_flatten=[{"filter": f.words.feed_forward, "value": False}],
    ),
}

MULTISLERP: dict[str, Write] = {
    "task vectors": _of("multislerp", {"weight": 0.6}, {"weight": 0.3}, {"weight": 0.4}),
    "models": _of("multislerp", {"weight": 0.6}, {"weight": 0.3}, {"weight": 0.4}, base=False),
    "not normalized": _of("multislerp", {}, {}, weight=0.7, normalize_weights=False),
    "negative weight": _of("multislerp", {"weight": 1.2}, {"weight": -0.3}),
    "one model": _of("multislerp", {"weight": 0.5}),
    "gradients": _of("multislerp", {"weight": [0.1, 0.9]}, {"weight": 0.5}, eps=[1e-8, 1e-6]),
    "filters": lambda f: plan_of(
        "multislerp",
        f,
        [{"weight": [{"filter": f.words.attention, "value": [0.2, 0.8]}]}, {}],
        weight=0.6,
        normalize_weights=[{"filter": f.words.norm, "value": False}],
    ),
}

KARCHER: dict[str, Write] = {
    "three models": _of("karcher", {}, {}, {}, base=False),
    "the base is one": _of("karcher", {}, {}),
    "one step": _of("karcher", {}, {}, {}, base=False, max_iter=1),
    "no step": _of("karcher", {}, {}, {}, base=False, max_iter=0),
    "gradient": _of("karcher", {}, {}, {}, base=False, tol=[1e-5, 1e-6]),
    "filters": lambda f: plan_of(
        "karcher",
        f,
        [{}, {}, {}],
        base=False,
        max_iter=[{"filter": f.words.attention, "value": 2}, {"value": 20}],
    ),
}

NEARSWAP: dict[str, Write] = {
    "scalar": _of("nearswap", {}, t=0.004),
    "small": _of("nearswap", {}, t=5e-7),
    "gradient": _of("nearswap", {}, t=[0.0, 0.02]),
    "filters": lambda f: plan_of(
        "nearswap", f, [{}], t=[{"filter": f.words.attention, "value": 0.01}, {"value": 0.002}]
    ),
}

MODEL_STOCK: dict[str, Write] = {
    "two models": _of("model_stock", {}, {}),
    "three models": _of("model_stock", {}, {}, {}),
    "by row": _of("model_stock", {}, {}, {}, filter_wise=True),
    "gradient": _of("model_stock", {}, {}, filter_wise=[False, True]),
    "filters": lambda f: plan_of(
        "model_stock", f, [{}, {}], filter_wise=[{"filter": f.words.attention, "value": True}]
    ),
}

ARCEE_FUSION: dict[str, Write] = {
    "as it is": _of("arcee_fusion", {}),
    "both models listed": lambda f: {
        **plan_of("arcee_fusion", f, [{}]),
        "models": [{"model": f.tuned[0]}, {"model": f.base}],
    },
}

PASSTHROUGH: dict[str, Write] = {
    "as it is": _of("passthrough", {}, base=False),
    "scalar": _of("passthrough", {"scale": 0.7}, base=False),
    "gradient": _of("passthrough", {"scale": [0.1, 1.0]}, base=False),
    "filters": lambda f: plan_of(
        "passthrough",
        f,
        [{"scale": [{"filter": f.words.attention, "value": 0.0}, {"value": [0.5, 0.9]}]}],
        base=False,
    ),
}

DENSE: dict[str, dict[str, Write]] = {
    "nuslerp": NUSLERP,
    "multislerp": MULTISLERP,
    "karcher": KARCHER,
    "nearswap": NEARSWAP,
    "model_stock": MODEL_STOCK,
    "arcee_fusion": ARCEE_FUSION,
    "passthrough": PASSTHROUGH,
}
