"""What changed and is no matrix of a linear layer: modules kept whole, and biases."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import role_of
from mergekit_ft.lora.changes import runs
from mergekit_ft.lora.folder import AdapterFolder
from mergekit_ft.lora.pairs import Pair, Pairs
from mergekit_ft.sources.adapter import PREFIX
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.sources.layout import listed


class Others:
    """Changed tensors that an adapter holds whole, as peft does under `modules_to_save`.

    Of a module that is kept, every tensor is written, changed or not: peft copies the module.
    A bias that changed alone is written as `bias: all` has it.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.found: dict[str, float] = {}  # tensor -> energy of its change
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(self, pair: Pair, energy: float) -> None:
        """Take a tensor; called from any thread."""
        with self._lock:
            self.found[pair.name] = energy

    def names(self) -> list[str]:
        """Return the changed tensors, in the order of the base."""
        return [name for name in self.pairs if name in self.found]

    @property
    def modules(self) -> list[str]:
        """Return the modules that are kept whole, those of tied names among them."""
        known = self.pairs.modules
        changed = {name for name in self.found if not self.pairs[name].is_bias}
        kept = {
            module
            for module, held in known.items()
            if any(pair.name in changed for pair in held.values())
        }
        if not kept:
            return []
        return sorted(name for name in known if name.endswith(tuple(kept)))  # as peft matches

    @property
    def biases(self) -> dict[str, Pair]:
        """Return the biases, by the model's names, that changed in modules not kept whole."""
        kept = set(self.modules)
        return {
            name: pair
            for module, held in self.pairs.modules.items()
            for name, pair in held.items()
            if module not in kept and pair.name in self.found
        }

    @property
    def reshaped(self) -> list[str]:
        """Return the tables that have other rows than the base's."""
        return [name for name in self.names() if self.pairs[name].reshaped]

    def require_savable(self, matrices: Mapping[str, Any]) -> None:
        """Refuse what peft would not load."""
        factored = {self.pairs[name].module for name in matrices}
        for module in self.modules:
            held = [pair.name for pair in self.pairs.modules[module].values()]
            if module in factored or self.pairs.skeleton.holds_modules(module, self._model_names()):
                raise self._refusal(held, "stand beside layers that have factors of their own")
            if any(self.pairs[name].tuned.dtype not in FLOATING for name in held):
                raise self._refusal(held, "are no floating-point weights")
            for name in held:
                tied = [a for a in self.pairs.aliases(name) if role_of(a) != "head"]
                if tied:
                    raise self._refusal(held, f"are tied to {listed(tied)}")

    def write(self, folder: AdapterFolder, factored: Collection[str]) -> None:
        """Write the modules that are kept, and the biases."""
        for module in self.modules:
            for name, pair in self.pairs.modules[module].items():
                self._put(folder, PREFIX + name, pair)
        for name, pair in self.biases.items():
            module = name.rpartition(".")[0]
            inner = ".base_layer" if module in factored else ""
            self._put(folder, f"{PREFIX}{module}{inner}.bias", pair)

    def _put(self, folder: AdapterFolder, name: str, pair: Pair) -> None:
        info = pair.tuned
        folder.append_runs(name, info.dtype, info.shape, runs(self.pairs.tuned, info))

    def _model_names(self) -> list[str]:
        return [pair.model_name for pair in self.pairs.values()]

    def _refusal(self, names: list[str], why: str) -> SourceError:
        return SourceError(
            f"{self.pairs.tuned.reference}: {listed(names)} changed, and {why}, so peft could not "
            "keep them whole; leave them out (--exclude, or --others skip)"
        )
