"""Every method in every way to set it, over two and three models: one table of plans.

A parameter has two values. A scalar setting is the first, a gradient runs from the first to the
second, and a filtered one has either, or a gradient, by the tensor's name. Each model's own values
are a little smaller than those of the model before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.peers.families import Family
from tests.peers.peer import Plan
from tests.peers.plans import plan_of

SETTINGS = ("scalar", "gradient", "filter")
FAMILIES = ("llama", "qwen2", "gpt2", "bert_classifier", "t5_gated", "mixtral")
SMALLER = 0.2  # of a value, by which the next model's is

Values = tuple[Any, Any]


class Method(NamedTuple):
    """What of a method is set."""

    own: Mapping[str, Values] = {}
    shared: Mapping[str, Values] = {}
    tuned: Mapping[int, int] = {2: 2, 3: 3}
    based: tuple[int, ...] = (2, 3)  # with how many models there is a base


WEIGHT: Mapping[str, Values] = {"weight": (0.6, 0.9)}
SPARSE: Mapping[str, Values] = {**WEIGHT, "density": (0.5, 0.8)}
BANDS: Mapping[str, Values] = {**SPARSE, "gamma": (0.05, 0.1)}
LAMBDA: Mapping[str, Values] = {"lambda_": (0.9, 1.2)}
PAIR: Mapping[int, int] = {2: 1}  # the base is one of the two

METHODS: dict[str, Method] = {
    "linear": Method(WEIGHT, based=()),
    "slerp": Method(shared={"t": (0.3, 0.7)}, tuned=PAIR),
    "nuslerp": Method(WEIGHT, tuned={2: 2, 3: 2}, based=(3,)),
    "multislerp": Method(WEIGHT, {"normalize_weights": (True, False)}, based=(3,)),
    "karcher": Method(shared={"tol": (1e-5, 1e-6)}, tuned={2: 2, 3: 2}, based=(3,)),
    "task_arithmetic": Method(WEIGHT, LAMBDA),
    "ties": Method(SPARSE, LAMBDA),
    "dare_linear": Method(WEIGHT, LAMBDA),  # without a density nothing is left to chance
    "dare_ties": Method(WEIGHT, {**LAMBDA, "normalize": (False, True)}),
    "della": Method(WEIGHT, LAMBDA),
    "della_linear": Method(WEIGHT, {**LAMBDA, "normalize": (False, True)}),
    "breadcrumbs": Method(BANDS, LAMBDA),
    "breadcrumbs_ties": Method(BANDS, {**LAMBDA, "rescale": (False, True)}),
    "model_stock": Method(shared={"filter_wise": (False, True)}),
    "nearswap": Method(shared={"t": (0.004, 0.02)}, tuned=PAIR),
    "sce": Method(shared={"select_topk": (0.4, 0.9)}),
    "arcee_fusion": Method(tuned=PAIR),
    "ram": Method(shared={"epsilon": (0.01, 0.02)}),
    "ramplus_tl": Method(shared={"r": (0.1, 0.3), "alpha": (0.2, 0.5), "epsilon": (0.01, 0.02)}),
    "passthrough": Method({"scale": (0.7, 1.1)}, tuned={1: 1}, based=()),
}


class Case(NamedTuple):
    """One plan of the table."""

    method: str
    setting: str
    models: int

    def plan(self, family: Family) -> Plan:
        """Return the plan over the checkpoints of a family."""
        method = METHODS[self.method]
        models = [
            {word: self._set(_less(values, i), family) for word, values in method.own.items()}
            for i in range(method.tuned[self.models])
        ]
        shared = {word: self._set(values, family) for word, values in method.shared.items()}
        return plan_of(self.method, family, models, base=self.models in method.based, **shared)

    def _set(self, values: Values, family: Family) -> Any:
        first, second = values
        if self.setting == "scalar":
            return first
        if self.setting == "gradient":
            return [first, second]
        return [
            {"filter": family.words.attention, "value": second},
            {"filter": family.words.feed_forward, "value": [second, first]},
            {"value": first},
        ]


def cases() -> Iterator[Case]:
    """Yield every plan of the table."""
    for name, method in METHODS.items():
        settings = SETTINGS if method.own or method.shared else SETTINGS[:1]
        yield from (Case(name, setting, k) for setting in settings for k in method.tuned)


def _less(values: Values, i: int) -> Values:
    first, second = (value * (1.0 - SMALLER * i) for value in values)
    return first, second
