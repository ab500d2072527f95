"""Words of fused models -> the models, open: of a plan, or of a file of fitted weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.errors import PlanError
from mergekit_ft.fusion.collecting import BASE, SMALL, expert
from mergekit_ft.fusion.speaking import Fixed, FusedSpeaker, Rule, Searched
from mergekit_ft.fusion.translating import Translated, translation
from mergekit_ft.fusion.weights import read_weights
from mergekit_ft.models.opening import around, open_speaker
from mergekit_ft.models.speaker import Speaker
from mergekit_ft.options import Options
from mergekit_ft.plan import ModelReference
from mergekit_ft.plan.fused import FusedPlan, SearchWords, read_fused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ".json"  # what a file of weights ends in
Words = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class FusedModels:
    """Models that were looked at, and will be opened: their tokens fit."""

    plan: FusedPlan
    rule: Rule
    ids: Mapping[str, Tensor | None]  # by role, what the base's tokens are there
    tokenizer: Any
    opening: Mapping[str, Any]  # offline, allow_pickle
    device: torch.device
    dtype: torch.dtype
    name: str

    @property
    def references(self) -> dict[str, ModelReference]:
        """Return the models by role."""
        return _references(self.plan)

    def open(self, **more: Any) -> FusedSpeaker:
        """Load the models, all into memory; `more` is FusedSpeaker's, and wraps of the base."""
        wrap: Callable[[Speaker], Speaker] = more.pop("shown", lambda speaker: speaker)
        base = wrap(self._open(BASE, BASE))
        small = None if self.plan.small is None else self._open(SMALL, SMALL)
        experts = {name: self._open(expert(name), name) for name in self.plan.experts}
        return FusedSpeaker(base, experts, self.rule, small=small, name=self.name, **more)

    def _open(self, role: str, word: str) -> Speaker:
        """Open the model of a role; the plan's devices and dtypes call it by a word."""
        named = (self.plan.devices or {}).get(word)
        device = self.device if named is None else Options(device=named).torch_device
        stored = (self.plan.dtypes or {}).get(word)
        dtype = self.dtype if stored is None else DTYPES[stored]
        reference = self.references[role]
        speaker: Speaker = open_speaker(reference, device=device, dtype=dtype, **self.opening)
        ids = self.ids[role]
        return speaker if ids is None else Translated(speaker, ids, self.tokenizer)


def fused_models(
    words: Words,
    *,
    domain: str | None = None,
    searched: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **opening: Any,
) -> FusedModels:
    """Return the fused models of a plan, or of a file of weights, their tokens compared.

    `domain` takes the weights of one domain; `searched` sets fitted weights aside and searches at
    each token.
    """
    plan = _plan(words, domain, searched)
    found = {role: around(model, **opening)[1] for role, model in _references(plan).items()}
    base = found[BASE].get_vocab()
    ids: dict[str, Tensor | None] = {BASE: None}
    for role, tokenizer in found.items():
        if role != BASE:
            ids[role] = translation(role, base, tokenizer.get_vocab(), plan.tokens)
    told = str(words) if isinstance(words, str | os.PathLike) else "the fused models"
    where = device or torch.device("cpu")
    return FusedModels(plan, _rule(plan), ids, found[BASE], opening, where, dtype, told)


def _plan(words: Words, domain: str | None, searched: bool) -> FusedPlan:
    if not isinstance(words, str | os.PathLike) or Path(words).suffix != WEIGHTS:
        if domain is not None:
            raise PlanError("domain: a plan has no weights by domain; a file of `fuse fit` does")
        plan = read_fused(words)
        if searched and plan.alpha is not None:
            return plan.model_copy(update={"alpha": None})
        return plan
    if searched and domain is not None:
        raise PlanError("domain has no effect: with search no fitted weights are used")
    weights = read_weights(words)
    alpha = None if searched else dict(weights.chosen(domain))
    experts = dict(weights.experts)
    return FusedPlan(base=weights.base, small=weights.small, experts=experts, alpha=alpha)


def _references(plan: FusedPlan) -> dict[str, ModelReference]:
    small = {} if plan.small is None else {SMALL: plan.small}
    experts = {expert(name): model for name, model in plan.experts.items()}
    return {BASE: plan.base, **small, **experts}


def _rule(plan: FusedPlan) -> Rule:
    if plan.alpha is not None:
        return Fixed(tuple(plan.alpha[name] for name in plan.experts))
    words = plan.search or SearchWords()
    return Searched(tuple(words.of(name) for name in plan.experts), words.how)
