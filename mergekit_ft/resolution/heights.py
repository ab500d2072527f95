"""How many layers each model has, and what the configs say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_ft.layers import Place, stacks
from mergekit_ft.plan import Reading
from mergekit_ft.plan.references import Key
from mergekit_ft.resolution.columns import Column
from mergekit_ft.resolution.conservation import conserved
from mergekit_ft.resolution.depths import Depths, declared, depths
from mergekit_ft.resolution.opening import Opened
from mergekit_ft.sources import Source

Places = Mapping[Key, Mapping[str, Place]]


class Heights:
    """The models of a plan by the layers of their stacks."""

    def __init__(self, reading: Reading, opened: Opened, places: Places) -> None:
        self.reading, self.opened, self.places = reading, opened, places
        self._stacks = {key: stacks(found) for key, found in places.items()}
        self._conserved: dict[Key, set[str]] = {}

    def layers(self, key: Key, stack: str | None, words: Sequence[str]) -> int:
        """Return how many layers of a stack a model has; those that predict further apart."""
        held = self._stacks[key].get(stack, 0) if stack is not None else 0
        return declared(self.opened[key].config, held, words) if held else 0

    def conserved(self, donor: Source, key: Key) -> set[str]:
        """Return the donor's tensors outside the layers that may be copied."""
        if key not in self._conserved:
            source, places = self.opened[key], self._of(donor)
            outside = [name for name in donor if places[name].layer is None]
            missing = [name for name in outside if source.locate(name) is None]
            self._conserved[key] = conserved(donor, source, places, missing)
        return self._conserved[key]

    def _of(self, donor: Source) -> Mapping[str, Place]:
        return next(self.places[key] for key, source in self.opened.items() if source is donor)

    def depths(self, columns: Sequence[Column], donor: Source) -> Depths:
        """Return what the output's config must say; what it cannot is a fault."""
        found = Depths()
        mine = next(key for key, source in self.opened.items() if source is donor)
        for column in columns:
            if column.stack is None or not column.slices:
                continue
            origins = [
                (self.opened[m.key].config, n, self.layers(m.key, column.stack, column.words))
                for m, n in column.origins()
            ]
            held = self._stacks[mine].get(column.stack, 0)
            one = depths(donor.config, held, origins, column.words)
            found.edits |= one.edits
            found.notes += one.notes
            found.faults += one.faults
        for fault in found.faults:
            where = ("modules",) if self.reading.plan and self.reading.plan.modules else ("slices",)
            self.reading.add(where, f"{donor.reference}: {fault}", key=True, kind="source")
        return found
