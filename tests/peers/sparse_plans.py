"""Plans over the methods that make task vectors sparse: by magnitude, variance or change."""

from __future__ import annotations

from typing import Any

from tests.peers.plans import Write, plan_of


def _on_base(method: str, *models: dict[str, Any], **parameters: Any) -> Write:
    return lambda f: plan_of(method, f, list(models), **parameters)


BREADCRUMBS: dict[str, Write] = {
    "both edges": _on_base("breadcrumbs", {}, {}, {}, weight=0.4, density=0.6, gamma=0.1),
    "default gamma": _on_base("breadcrumbs", {"weight": 0.4}, {"weight": 0.7}, density=0.3),
    "no density": _on_base("breadcrumbs", {"weight": 0.4}, {"weight": -0.7}, gamma=0.2),
    "more than may go": _on_base("breadcrumbs", {}, {}, weight=0.5, density=0.8, gamma=0.5),
    "small density": _on_base("breadcrumbs", {}, {}, weight=1.0, density=0.01, gamma=0.0),
    "zero density": _on_base("breadcrumbs", {"weight": 1, "density": 0.0}, {"weight": 0.5}),
    "normalize, rescale, lambda": _on_base(
        "breadcrumbs",
        {"weight": 0.4, "gamma": 0.05},
        {"weight": 0.7, "gamma": 0.0},
        density=0.5,
        normalize=True,
        rescale=True,
        lambda_=1.3,
        int8_mask=True,
    ),
    "gradients": _on_base(
        "breadcrumbs",
        {"weight": [0.1, 0.9], "density": [0.2, 0.8, 1.0], "gamma": [0.0, 0.1]},
        {"weight": 0.5, "density": [0.9, 0.4]},
        lambda_=[0.5, 1.1],
        normalize=[True, False],
        rescale=[False, True],
    ),
    "filters": lambda f: plan_of(
        "breadcrumbs",
        f,
        [
            {"gamma": [{"filter": f.words.attention, "value": [0.0, 0.2]}, {"value": 0.02}]},
            {"density": [{"filter": f.words.feed_forward, "value": 0.33}]},
        ],
        weight=0.6,
        density=[{"filter": f.words.norm, "value": 1.0}, {"value": 0.55}],
        int8_mask=[{"filter": f.words.attention, "value": True}],
    ),
}

BREADCRUMBS_TIES: dict[str, Write] = {
    "both edges": _on_base("breadcrumbs_ties", {}, {}, {}, weight=0.4, density=0.6, gamma=0.1),
    "default gamma": _on_base("breadcrumbs_ties", {"weight": 0.4}, {"weight": 0.7}, density=0.3),
    "no density": _on_base("breadcrumbs_ties", {"weight": 0.4}, {"weight": -0.7}),
    "normalize, rescale, lambda": _on_base(
        "breadcrumbs_ties",
        {"weight": 0.4, "gamma": 0.05},
        {"weight": 0.7, "gamma": 0.0},
        {"weight": 0.2},
        density=0.5,
        normalize=True,
        rescale=True,
        lambda_=1.3,
    ),
    "gradients": _on_base(
        "breadcrumbs_ties",
        {"weight": [0.1, 0.9], "density": [0.2, 0.8, 1.0], "gamma": [0.0, 0.1]},
        {"weight": 0.5, "density": [0.9, 0.4]},
        lambda_=[0.5, 1.1],
        normalize=[True, False],
        rescale=[False, True],
    ),
    "filters": lambda f: plan_of(
        "breadcrumbs_ties",
        f,
        [{"gamma": [{"filter": f.words.attention, "value": 0.2}]}, {}],
        weight=0.6,
        density=[{"filter": f.words.norm, "value": 1.0}, {"value": 0.55}],
    ),
}

SCE: dict[str, Write] = {
    "all": _on_base("sce", {}, {}, {}),
    "half": _on_base("sce", {}, {}, select_topk=0.5, int8_mask=True),
    "few of three": _on_base("sce", {}, {}, {}, select_topk=0.03),
    "gradient": _on_base("sce", {}, {}, {}, select_topk=[0.1, 0.9, 1.0]),
    "one model": _on_base("sce", {}),
    "filters": lambda f: plan_of(
        "sce",
        f,
        [{}, {}, {}],
        select_topk=[
            {"filter": f.words.attention, "value": [0.2, 0.7]},
            {"filter": f.words.norm, "value": 0.0},
            {"value": 0.4},
        ],
    ),
}

RAM: dict[str, Write] = {
    "default": _on_base("ram", {}, {}, {}),
    "epsilon": _on_base("ram", {}, {}, epsilon=0.01),
    "three models": _on_base("ram", {}, {}, {}, epsilon=0.02),
    "one model": _on_base("ram", {}, epsilon=0.005),
    "gradient": _on_base("ram", {}, {}, epsilon=[0.001, 0.02]),
    "filters": lambda f: plan_of(
        "ram",
        f,
        [{}, {}, {}],
        epsilon=[{"filter": f.words.attention, "value": [0.0, 0.03]}, {"value": 0.01}],
    ),
}

RAMPLUS_TL: dict[str, Write] = {
    "default": _on_base("ramplus_tl", {}, {}, {}),
    "epsilon": _on_base("ramplus_tl", {}, {}, epsilon=0.01),
    "alpha bounds": _on_base("ramplus_tl", {}, {}, {}, r=0.5, alpha=0.3, epsilon=0.01),
    "overlap counts": _on_base("ramplus_tl", {}, {}, {}, r=0.5, alpha=9.0, epsilon=0.015),
    "gradients": _on_base(
        "ramplus_tl", {}, {}, r=[0.0, 0.4], alpha=[0.1, 2.0], epsilon=[0.001, 0.02]
    ),
    "filters": lambda f: plan_of(
        "ramplus_tl",
        f,
        [{}, {}, {}],
        r=[{"filter": f.words.attention, "value": 0.6}, {"filter": f.words.norm, "value": -0.2}],
        epsilon=0.01,
    ),
}

DELLA: dict[str, Write] = {  # where nothing is dropped: chance has no peer
    "no density": _on_base("della", {"weight": 0.4}, {"weight": 0.7}, {"weight": 0.2}),
    "not normalized": _on_base("della", {}, {}, weight=0.4, normalize=False, lambda_=1.2),
    "zero density": _on_base("della", {"weight": 1, "density": 0.0}, {"weight": 0.5}),
    "filters": lambda f: plan_of(
        "della",
        f,
        [{"weight": [{"filter": f.words.attention, "value": [0.2, 0.8]}]}, {}],
        weight=0.6,
        density=[{"filter": f.words.norm, "value": 0.0}, {"value": 1.0}],
        epsilon=0.2,
        normalize=[{"filter": f.words.feed_forward, "value": False}],
    ),
}

DELLA_LINEAR: dict[str, Write] = {
    "no density": _on_base("della_linear", {"weight": 0.4}, {"weight": 0.7}, {"weight": -0.2}),
    "normalize": _on_base("della_linear", {"weight": 0.4}, {"weight": 0.7}, normalize=True),
    "zero density": _on_base("della_linear", {"weight": 1, "density": 0.0}, {"weight": 0.5}),
    "gradients": _on_base(
        "della_linear", {"weight": [0.1, 0.9]}, {"weight": 0.5}, lambda_=[0.4, 0.9], epsilon=0.1
    ),
}

SPARSE: dict[str, dict[str, Write]] = {
    "breadcrumbs": BREADCRUMBS,
    "breadcrumbs_ties": BREADCRUMBS_TIES,
    "sce": SCE,
    "ram": RAM,
    "ramplus_tl": RAMPLUS_TL,
    "della": DELLA,
    "della_linear": DELLA_LINEAR,
}
