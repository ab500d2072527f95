"""A model run layer by layer from its checkpoint, with one decoder layer in memory.

Nothing here knows an architecture. For each layer the model's own forward is run with every other
layer passing on what it was given and this one given the states that the last one left; so masks,
positions, and what differs from layer to layer are the model's own. Then it is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_ft.models.hollow import Hollow
from mergekit_ft.models.shelf import BUDGET, Shelf
from mergekit_ft.sources import Source

Observed = Callable[[int, Tensor], None]  # a batch's number, what a module was given there
Asked = tuple[Tensor, Tensor]  # rows and places whose logits are wanted


class _Enough(Exception):
    """What was wanted has come out."""


@dataclass(frozen=True)
class Batch:
    """Texts that are read side by side."""

    tokens: Tensor  # (b, n)
    mask: Tensor | None = None  # (b, n) 1 where there is a token; None: texts end in padding, or
    # have none, so that no token looks at any

    def words(self, device: torch.device) -> dict[str, Any]:
        """Return what a model is given besides what it reads."""
        words: dict[str, Any] = {"use_cache": False}
        if self.mask is not None:
            words["attention_mask"] = self.mask.to(device)
        return words


class Streamed:
    """A causal language model whose layers are read from the checkpoint as they are needed."""

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.hollow = Hollow(source, dtype, device or torch.device("cpu"))
        self.model, self.layers, self.say = self.hollow.model, self.hollow.layers, say
        self.device, self.dtype = self.hollow.device, dtype
        self._tuples: bool | None = None
        around = self.hollow.outside()
        self._ends = [
            name
            for part in (self.hollow.head, self.hollow.embedding)
            for name in self.hollow.within(part)
        ]
        self.hollow.fill([name for name in around if name not in self._ends])

    @torch.no_grad()
    def run(
        self,
        batches: Sequence[Batch],
        *,
        upto: int | None = None,
        observe: Mapping[str, Observed] | None = None,
        budget: int = BUDGET,
        after: tuple[int, Shelf] | None = None,
    ) -> Shelf:
        """Return what leaves layer `upto` (the last: None), by the number of each batch.

        -1 is what enters the first. `observe` is told what a module, named by its path in the
        model, is given in each batch. `after` is a layer and what left it: the run goes on there,
        and what was left is written over.
        """
        last = len(self.layers) - 1 if upto is None else upto
        left, states = (-1, Shelf(budget)) if after is None else after
        if after is None:
            with self._embedding():
                for number, batch in enumerate(batches):
                    states.put(number, self._embedded(batch))
        for i in range(left + 1, last + 1):
            self.say(f"layer {i + 1} of {last + 1}")
            with self.layer(i), self._observing(i, observe or {}) as now:
                for number, batch in enumerate(batches):
                    now[0] = number
                    entering = states.get(number).to(self.device)
                    states.put(number, self.through(i, batch, entering))
        return states

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch], asked: Sequence[Asked]) -> Iterator[Tensor]:
        """Yield (q, vocabulary) logits of each batch at its asked (rows, places)."""
        states = self.run(batches)
        with self.head():
            for number, (batch, (rows, places)) in enumerate(zip(batches, asked, strict=True)):
                entering = states.get(number).to(self.device)
                yield self.above(len(self.layers) - 1, batch, entering, rows, places)
        states.close()

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """Hold a layer's weights in memory."""
        names = self.hollow.within(self.layers[i])
        self.hollow.fill(names)
        try:
            yield self.layers[i]
        finally:
            self.hollow.empty(names)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the head's weights in memory."""
        names = self.hollow.within(self.hollow.head)
        self.hollow.fill(names)
        try:
            yield
        finally:
            self.hollow.empty(names)

    @contextmanager
    def _embedding(self) -> Iterator[None]:
        names = self.hollow.within(self.hollow.embedding)
        self.hollow.fill(names)
        try:
            yield
        finally:
            self.hollow.empty(names)

    def fill_above(self, layer: int, without: Set[str] = frozenset()) -> None:
        """Hold in memory, from now on, what comes above a layer, the head included.

        `without` are the model's names of what others stand for.
        """
        for above in (*self.layers[layer + 1 :], self.hollow.head):
            self.hollow.fill([n for n in self.hollow.within(above) if n not in without])

    def through(self, i: int, batch: Batch, entering: Tensor) -> Tensor:
        """Return what leaves a layer, which is in memory, where (b, n, h) enters it."""
        with ExitStack() as changes:
            for other in range(i):
                changes.enter_context(self._passing(other, None))
            out = self._stopped_at(i, batch, entering)
        return out

    def above(
        self,
        layer: int,
        batch: Batch,
        leaving: Tensor,
        rows: Tensor,
        places: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return (q, vocabulary) logits at (rows, places) where `leaving` (b, n, h) leaves a layer.

        Layer -1 is what the first one is given. What comes above is in memory; `weights` stand for
        parameters of it, by the model's names.
        """
        with ExitStack() as changes:
            for other in range(layer + 1):
                put = leaving if other == layer else None
                changes.enter_context(self._passing(other, put))
            if layer < 0:
                changes.enter_context(self._given(leaving))
            changes.enter_context(self._asked(rows, places))
            said = self._said(batch, weights)
        logits: Tensor = said.logits[0]
        return logits

    def _embedded(self, batch: Batch) -> Tensor:
        """Return what enters the first layer."""
        found: list[Tensor] = []

        def forward(hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            found.append(hidden_states)
            raise _Enough

        with _standing_in(self.layers[0], forward), suppress(_Enough):
            self.model(input_ids=batch.tokens.to(self.device), **batch.words(self.device))
        return found[0]

    def _stopped_at(self, i: int, batch: Batch, entering: Tensor) -> Tensor:
        """Run the model up to layer i, which is given `entering`."""
        found: list[Tensor] = []
        own = type(self.layers[i]).forward

        def forward(hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            out = own(self.layers[i], entering, *given, **named)
            self._tuples = isinstance(out, tuple)
            found.append(out[0] if isinstance(out, tuple) else out)
            raise _Enough

        with _standing_in(self.layers[i], forward), suppress(_Enough):
            self._said(batch)
        return found[0]

    def _said(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Any:
        """Run the model on a batch whose embeddings are of no matter, for a layer is given all."""
        b, n = batch.tokens.shape
        width = self.hollow.embedding.embedding_dim
        nothing = torch.zeros(b, n, width, dtype=self.dtype, device=self.device)
        words = {"inputs_embeds": nothing, **batch.words(self.device)}
        return functional_call(self.model, dict(weights or {}), (), words)

    def _given(self, put: Tensor) -> Any:
        """Let the first layer be given `put`."""
        first = self.layers[0]
        own = type(first).forward

        def forward(hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            return own(first, put, *given, **named)

        return _standing_in(first, forward)

    def _passing(self, i: int, put: Tensor | None) -> Any:
        """Let a layer pass on what it was given, or `put` where there is that."""

        def forward(hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            out = hidden_states if put is None else put
            return (out,) if self._tuples else out

        return _standing_in(self.layers[i], forward)

    @contextmanager
    def _observing(self, i: int, observe: Mapping[str, Observed]) -> Iterator[list[int]]:
        """Tell of what modules of a layer are given; the list holds the batch's number."""
        now, path = [0], f"{self.hollow.stack}.{i}"
        with ExitStack() as hooks:
            for name, tell in observe.items():
                if name == path or name.startswith(f"{path}."):
                    module = self.model.get_submodule(name)
                    handle = module.register_forward_pre_hook(
                        lambda _, given, tell=tell: tell(now[0], given[0])
                    )
                    hooks.callback(handle.remove)
            yield now

    @contextmanager
    def _asked(self, rows: Tensor, places: Tensor) -> Iterator[None]:
        """Show the head these places alone, as one row."""

        def narrow(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (given[0][rows, places][None],)

        handle = self.hollow.head.register_forward_pre_hook(narrow)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _standing_in(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward  # what was put before the class's own
