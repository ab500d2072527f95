"""Which tensors the layers of a stack have: layers of unlike tensors do not stand for another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergekit_ft.layers import Place, renumbered
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.references import Key
from mergekit_ft.resolution.columns import Column, Slice, Taken
from mergekit_ft.resolution.conservation import BUFFER
from mergekit_ft.resolution.depths import speaks
from mergekit_ft.resolution.leftovers import named
from mergekit_ft.resolution.opening import Opened
from mergekit_ft.sources import Source

Misfit = tuple[Keys, str]


class Kinds:
    """The layers of one stack in every model, by the names of their tensors."""

    def __init__(
        self, opened: Opened, places: Mapping[Key, Mapping[str, Place]], column: Column
    ) -> None:
        self.opened, self.column = opened, column
        self._names: dict[tuple[Key, int], list[str]] = {}
        self._kinds: dict[tuple[Key, int], frozenset[str]] = {}
        for key, found in places.items():
            for name, place in found.items():
                if place.layer is not None and place.stack == column.stack:
                    self._names.setdefault((key, place.layer), []).append(name)
        for (key, layer), names in self._names.items():
            kind = (renumbered(name, places[key][name], 0) for name in names)
            self._kinds[key, layer] = frozenset(k for k in kind if not BUFFER.fullmatch(k))

    def names(self, key: Key, layer: int) -> list[str]:
        """Return the tensors of a layer in the model's order."""
        return self._names.get((key, layer), [])

    def misfits(self, donor: Source) -> Iterator[Misfit]:
        """Yield what is lost or out of place, with the path of the words that ask for it."""
        told: set[Keys] = set()
        for layer, one in self.column.rows():
            for misfit in (*self._within(layer, one), *self._at(layer, one, donor)):
                if misfit[0] not in told:
                    told.add(misfit[0])
                    yield misfit

    def _kind(self, one: Slice, taken: Taken, layer: int) -> frozenset[str]:
        return self._kinds.get((taken.model.key, one.layer_of(taken, layer)), frozenset())

    def _within(self, layer: int, one: Slice) -> Iterator[Misfit]:
        """Yield the tensors of a source that the first of its slice lacks."""
        first = one.taken[0]
        for taken in one.taken[1:]:
            more = sorted(self._kind(one, taken, layer) - self._kind(one, first, layer))
            if more:
                yield (
                    taken.path,
                    f"layer {one.layer_of(taken, layer)} of {taken.model} has {named(more)} that "
                    f"layer {one.layer_of(first, layer)} of {first.model} lacks; only layers of "
                    "one kind merge",
                )

    def _at(self, layer: int, one: Slice, donor: Source) -> Iterator[Misfit]:
        """Yield a layer that stands where the model has one of another kind."""
        key = next(key for key, source in self.opened.items() if source is donor)
        last = max((n for k, n in self._kinds if k == key), default=0)
        usual = self._kinds.get((key, min(layer, last)), frozenset())
        kind = self._kind(one, one.taken[0], layer)
        if kind == usual or speaks(donor.config):
            return
        yield (
            one.taken[0].path,
            f"output layer {layer} would have other tensors than layer {min(layer, last)} of "
            f"{donor.reference}: {named(sorted(kind ^ usual))}; its config.json tells no kinds of "
            "layers apart, so keep such layers in their places",
        )
