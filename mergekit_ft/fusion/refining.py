"""Coefficients of every tensor moved until the merged weights say what the fused models say.

One backward pass gives them all: with theta = theta_0 + sum lambda_tl tau_tl and a loss L,
dL/dlambda_tl = <grad_l L, tau_tl>. Each gradient meets its task vectors, read from the sources, as
soon as it is there, and is let go: no second model of gradients is held.
The model that is asked has its weights rounded as they will be stored: where tuning moved weights
by about one step of the stored dtype, rounding changes how much of a task vector arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.fused import fuse, shifts
from mergekit_ft.data.rows import Sample
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.fusion.collecting import Collection, Recorded
from mergekit_ft.fusion.recording import batches, questions
from mergekit_ft.fusion.texts import scored
from mergekit_ft.fusion.verifying import places_of
from mergekit_ft.models.opening import Base
from mergekit_ft.sources import Source

STEPS, RATE, BETAS = 16, 0.05, (0.9, 0.99)  # of Adam; the rate falls as a cosine to nothing
HOLD = 0.25  # of the mean square that an expert's coefficients have moved


@dataclass(frozen=True)
class Coefficients:
    """How much of each expert's task vector each tensor has."""

    tensors: tuple[str, ...]
    values: Tensor  # (k, tensors) float64

    def of(self, expert: int) -> Iterator[tuple[str, float]]:
        """Yield one expert's, by tensor."""
        yield from zip(self.tensors, self.values[expert].tolist(), strict=True)


class Refiner:
    """A model whose weights are the base's and task vectors by coefficients."""

    def __init__(
        self,
        base: Base,
        experts: Mapping[str, Source],
        collection: Collection,
        alpha: Sequence[float],
        stored: Mapping[str, torch.dtype],
        watch: Callable[[int], None] = lambda places: None,
    ) -> None:
        self.base, self.experts, self.collection = base, experts, collection
        self.alpha = torch.tensor(alpha, dtype=torch.float64)
        self.stored, self.watch = stored, watch
        values = self.alpha[:, None].expand(-1, len(stored)).clone()
        self.origin = Coefficients(tuple(stored), values)
        self.columns = {name: column for column, name in enumerate(stored)}
        for name, source in experts.items():
            for tensor in base.parameters:
                if tensor not in source:
                    raise SourceError(f"{source.reference}: expert {name} has no {tensor}")

    def refined(self, steps: int = STEPS) -> tuple[Coefficients, list[float]]:
        """Return the best coefficients of a few steps of Adam, and the loss before each."""
        values = self.origin.values.clone().requires_grad_()
        adam = torch.optim.Adam([values], betas=BETAS)
        best, losses = self.origin, []
        for step in range(steps + 1):
            here = Coefficients(self.origin.tensors, values.detach().clone())
            loss, gradient = self.loss(here, graded=step < steps)
            losses.append(loss)
            if loss <= min(losses):
                best = here
            if step < steps:
                adam.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
                values.grad = gradient
                adam.step()
        return best, losses

    def loss(self, at: Coefficients, *, graded: bool = True) -> tuple[float, Tensor]:
        """Return mean KL(fused || merged) over fitted places, held to the start; its gradient."""
        self.put(at)
        total, weight = 0.0, self._weight()
        with self._met() as gradient:
            for samples, spans in self._groups():
                with torch.set_grad_enabled(graded):
                    part = self._divergence(samples, spans) / weight
                if graded:
                    part.backward()  # type: ignore[no-untyped-call]
                total += float(part.detach())
                self.watch(sum(stop - first for first, stop in spans))
        away = at.values - self.origin.values
        hold = HOLD / len(at.tensors)
        value = total + 0.5 * hold * float(away.square().sum())
        if not math.isfinite(value):
            raise OperatorError("refining met values that are not numbers")
        return value, gradient + hold * away

    @torch.no_grad()
    def put(self, at: Coefficients) -> None:
        """Give the model theta_0 + sum lambda tau, rounded."""
        for name, parameter in self.base.parameters.items():
            factors = at.values[:, self.columns[name]].tolist()
            values = self.base.origin(name)
            for factor, move in zip(factors, self._moves(name), strict=True):
                values = values + factor * move
            parameter.copy_(values.to(self.stored[name]))

    @contextmanager
    def _met(self) -> Iterator[Tensor]:
        """Give (k, tensors) <gradient, task vector>, which backward passes inside add to."""
        found = torch.zeros_like(self.origin.values)

        def meet(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad.flatten().double(), None
            for t, move in enumerate(self._moves(name)):
                found[t, self.columns[name]] += torch.dot(gradient, move.flatten().double())

        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(meet, name))  # type: ignore[no-untyped-call]
            for name, parameter in self.base.parameters.items()
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _moves(self, name: str) -> Iterator[Tensor]:
        origin = self.base.origin(name)
        for source in self.experts.values():
            yield source.tensor(name).float().sub_(origin)

    @property
    def places(self) -> int:
        """Return how many places a step goes through."""
        spans = self.collection.texts.spans(self.collection.texts.domains, held=False)
        return sum(stop - first for first, stop in spans)

    def _weight(self) -> float:
        spans = self.collection.texts.spans(self.collection.texts.domains, held=False)
        return float(sum(self.collection.weights[first:stop].sum() for first, stop in spans))

    def _groups(self) -> Iterator[tuple[list[Sample], list[tuple[int, int]]]]:
        for part in self.collection.texts.parts:
            if part.held:
                continue
            starts = places_of(part)
            for group in batches(part.samples):
                spans = [(starts[i], starts[i] + scored(part.samples[i])) for i in group]
                yield [part.samples[i] for i in group], spans

    def _divergence(self, samples: list[Sample], spans: list[tuple[int, int]]) -> Tensor:
        """Return the weighted sum of KL(fused || merged) over the places of some samples."""
        logs = self._said(samples)
        total = torch.zeros((), dtype=torch.float64)
        at = 0
        for heard in Recorded(self.collection, list(self.experts), spans):
            n = len(heard.targets)
            fused = fuse(heard.base, shifts(heard.tuned, heard.small), self.alpha).float()
            apart = (fused.exp() * (fused - logs[at : at + n])).sum(-1)
            total = total + (heard.weights * apart.double()).sum()
            at += n
        return total

    def _said(self, samples: list[Sample]) -> Tensor:
        """Return (m, vocabulary) float32 log-probabilities at scored places, with gradient."""
        tokens, mask, at, _ = questions(samples)
        model: Any = self.base.model
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][at], *given[1:]))
        try:
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        finally:
            hook.remove()
        return torch.log_softmax(logits[:, : self.collection.shape.vocabulary].float(), -1)
