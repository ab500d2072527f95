"""A model in memory, layer by layer: looked into, stopped early, or gone on with from a layer on.

Nothing here knows an architecture: a layer that is not run passes on what stands for its output,
and the head is shown the asked places alone, so that masks, positions, norms and what comes after
the head are the model's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import places, stacks
from mergekit_ft.models.opening import Base
from mergekit_ft.models.speaker import positions


class _Enough(Exception):
    """All that was asked for has been seen."""


@dataclass(frozen=True)
class Look:
    """A module whose input, or output, is wanted."""

    module: nn.Module
    out: bool = False


@dataclass(frozen=True)
class Texts:
    """Texts of which a first part may have been read already, and is not read again."""

    tokens: Tensor  # (b, n) what is to be read
    mask: Tensor  # (b, p + n) 1 where there is a token, of what has been read too
    cache: Any = None  # of the first part

    def words(self) -> dict[str, Any]:
        """Return what a model is given; the cache is a copy, for it is added to."""
        words = {"input_ids": self.tokens, "attention_mask": self.mask}
        if self.cache is None:
            return {**words, "use_cache": False}
        places = positions(self.mask)[:, -self.tokens.shape[1] :]
        kept = copy.deepcopy(self.cache)
        return {**words, "position_ids": places, "past_key_values": kept, "use_cache": True}


class Layered:
    """The layers of a causal language model, which is not trained."""

    def __init__(self, base: Base) -> None:
        model: Any = base.model
        self.model = model.eval().requires_grad_(False)
        self.layers = _layers(base)
        self.head: Any = self.model.get_output_embeddings()
        if self.head is None:
            raise SourceError(f"{base.source.reference}: has no head, so it says nothing")
        self._placed = "position_ids" in inspect.signature(self.model.forward).parameters
        self._tuples = self._returning_tuples()

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @torch.no_grad()
    def _returning_tuples(self) -> set[nn.Module]:
        """Return the layers that return their output in a tuple, as one token shows."""
        found: set[nn.Module] = set()

        def note(module: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, tuple):
                found.add(module)

        handles = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.model(input_ids=token, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def begin(self, tokens: Tensor, mask: Tensor, split: int) -> Texts:
        """Read the first `split` columns, padded on the left, of (b, p + n)."""
        first = mask[:, :split]
        words = {"input_ids": tokens[:, :split], "attention_mask": first}
        nowhere = torch.arange(0, device=tokens.device)
        with self._asked(nowhere, nowhere):
            said = self._said({**words, "position_ids": positions(first), "use_cache": True})
        return Texts(tokens[:, split:], mask, said.past_key_values)

    def _said(self, words: dict[str, Any]) -> Any:
        kept = {k: v for k, v in words.items() if k != "position_ids" or self._placed}
        return self.model(**kept)

    @torch.no_grad()
    def look(self, texts: Texts, looks: Sequence[Look]) -> list[Tensor]:
        """Return (b, n, width) of each look; nothing above the last is run."""
        seen: dict[int, Tensor] = {}

        def see(place: int, value: Any) -> None:
            seen[place] = _first(value).detach()
            if len(seen) == len(looks):
                raise _Enough

        with ExitStack() as hooks:
            for place, wanted in enumerate(looks):
                hooks.enter_context(_seeing(wanted, place, see))
            with suppress(_Enough):
                self._said(texts.words())
        return [seen[place] for place in range(len(looks))]

    def above(
        self, texts: Texts, layer: int, leaving: Tensor, rows: Tensor, places: Tensor
    ) -> Tensor:
        """Return (q, vocabulary) logits at (rows, places) where `leaving` (b, n, h) leaves a layer.

        Layers up to that one are not run.
        """
        with ExitStack() as changes:
            for number in range(layer + 1):
                put = leaving if number == layer else None
                changes.enter_context(self._standing_in(self.layers[number], put))
            changes.enter_context(self._asked(rows, places))
            said = self._said(texts.words())
        logits: Tensor = said.logits[0]
        return logits

    @contextmanager
    def _standing_in(self, layer: nn.Module, put: Tensor | None) -> Iterator[None]:
        """Let a layer pass on what it was given, or `put` where there is that."""

        def forward(hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            out = hidden_states if put is None else put
            return (out,) if layer in self._tuples else out

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward  # what was put before the class's own

    @contextmanager
    def _asked(self, rows: Tensor, places: Tensor) -> Iterator[None]:
        """Show the head these places alone, as one row."""

        def narrow(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (given[0][rows, places][None],)

        handle = self.head.register_forward_pre_hook(narrow)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _seeing(look: Look, place: int, see: Any) -> Iterator[None]:
    if look.out:
        handle = look.module.register_forward_hook(lambda module, given, out: see(place, out))
    else:
        handle = look.module.register_forward_pre_hook(lambda module, given: see(place, given))
    try:
        yield
    finally:
        handle.remove()


def _first(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple) else value
    return found


def _layers(base: Base) -> list[nn.Module]:
    """Return the modules of the longest stack, in order."""
    found = stacks(base.places)
    if not found:
        raise SourceError(f"{base.source.reference}: its names show no stack of layers")
    stack = max(found, key=lambda name: found[name])
    own = {id(parameter): name for name, parameter in base.model.named_parameters()}
    paths: dict[int, str] = {}
    for name, parameter in base.parameters.items():
        place = base.places[name]
        if place.stack == stack and place.layer is not None:
            path = own[id(parameter)]
            inside = places([path])[path]
            paths[place.layer] = f"{inside.stack}.{place.layer}"
    return [base.model.get_submodule(paths[layer]) for layer in range(found[stack])]
