"""Stacks of output layers: which layers of which models each is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_ft.layers import role_of
from mergekit_ft.plan import ModelReference, Part
from mergekit_ft.plan.entries import InputSlice
from mergekit_ft.plan.marks import Keys

AFTER = re.compile(r"(?:^|\.)pooler(?:\.|$)")  # it reads what the last layer gives
BEFORE = re.compile(r"(?:^|\.)pre_?la?y(?:e?r)?norm")  # a norm that the first layer reads


@dataclass(frozen=True)
class Taken:
    """Layers of a model, counted from `first`, `end` not included."""

    model: ModelReference
    path: Keys  # of the words that name it
    first: int
    end: int
    base: bool = False  # what the others were tuned from

    @property
    def span(self) -> range:
        """Return its layers."""
        return range(self.first, self.end)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, and the models that are merged into them."""

    part: Part
    first: int  # the number of its first layer in the output
    taken: tuple[Taken, ...]  # at least one, all of one length; the base among them where listed

    @property
    def layers(self) -> int:
        """Return how many layers it has."""
        return len(self.taken[0].span)

    def depth(self, layer: int) -> float:
        """Return where an output layer stands within the slice, 0 to 1; a lone one is at 1."""
        return 1.0 if self.layers < 2 else (layer - self.first) / (self.layers - 1)

    def layer_of(self, taken: Taken, layer: int) -> int:
        """Return the layer of a model that an output layer is made of."""
        return taken.first + layer - self.first


@dataclass
class Column:
    """One stack of the output."""

    stack: str | None  # the prefix before the layer number; None where there are no layers
    loose: frozenset[str] = frozenset()  # the donor's tensors outside the layers that go with it
    words: tuple[str, ...] = ()  # that tell its part of a config, where there are several stacks
    slices: list[Slice] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Return how many layers the output has."""
        return sum(one.layers for one in self.slices)

    def rows(self) -> Iterator[tuple[int, Slice]]:
        """Yield each layer of the output and the slice that it is in."""
        for one in self.slices:
            yield from ((layer, one) for layer in range(one.first, one.first + one.layers))

    def origins(self) -> list[tuple[ModelReference, int]]:
        """Return the model and the layer that each output layer has its first source in."""
        found = ((one.taken[0], one, layer) for layer, one in self.rows())
        return [(taken.model, one.layer_of(taken, layer)) for taken, one, layer in found]

    def outside(self, name: str) -> Slice:
        """Return the slice that a tensor outside the layers belongs to: the first, or the last."""
        last = role_of(name) in ("norm", "head") and not BEFORE.search(name)
        return self.slices[-1] if last or AFTER.search(name) else self.slices[0]


def slices_of(parts: Sequence[Part], layers: Mapping[Keys, int], based: bool) -> list[Slice]:
    """Return the output's slices in order; whole models take all the layers that they have.

    Where the merge is `based`, a base that is not listed takes what all others take.
    """
    found: list[Slice] = []
    for part in parts:
        taken = _taken(part, layers, based)
        if taken:
            found.append(Slice(part, sum(one.layers for one in found), taken))
    return found


def _taken(part: Part, layers: Mapping[Keys, int], based: bool) -> tuple[Taken, ...]:
    found = []
    for i, item in enumerate(part.items):
        path = (*part.path, i)
        whole = (0, layers.get(path, 0))
        first, end = item.layer_range if isinstance(item, InputSlice) else whole
        is_base = part.base is not None and item.model.key == part.base.key
        found.append(Taken(item.model, path, first, end, is_base))
    ranges = {(one.first, one.end) for one in found}
    listed = any(one.base for one in found)
    if based and part.base is not None and not listed and len(ranges) == 1:
        found.append(Taken(part.base, part.base_path, *next(iter(ranges)), base=True))
    return tuple(found)
