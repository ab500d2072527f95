"""The second moment of a matrix's inputs over text, C = (1/T) sum k k^T: gathered and remembered.

C is not centred. Text is taken in rounds; a layer is settled, and takes no more, once T has ten
tokens for each entry of a key and a round changes C by less than a thousandth of its norm. What was
gathered is remembered in the user's cache folder, one file a layer, under a hash of all that
decides it: the weights up to the layer, the config, the text, the tokenizer, the rule above.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ft.algebra.associations import ENOUGH, require_finite, require_seen
from mergekit_ft.blocks import view_of
from mergekit_ft.checkpoint.digests import cache_folder
from mergekit_ft.editing.corpus import Corpus
from mergekit_ft.layers import Place
from mergekit_ft.sources import Source
from mergekit_ft.sources.patched import tensor_hash

SETTLED = 1e-3  # relative change of C by one more round
ROUND = 16384  # tokens between two looks at the change
FORMAT = 1  # of the remembered files, in their hash

Keys = Callable[[Sequence[tuple[int, ...]], Sequence[int]], Iterator[tuple[int, Tensor]]]
# windows and layers -> (t, d_in) inputs of a layer's matrix, window by window, always in one order


@dataclass(frozen=True)
class Statistics:
    """C of one layer, and what it is of."""

    second: Tensor  # (d_in, d_in) float64
    tokens: int
    corpus: str  # SHA-256 of the text
    change: float  # relative, by the last round; infinite where there was one alone

    def told(self) -> dict[str, Any]:
        """Return what goes into the provenance."""
        settled = self.change < SETTLED
        change = self.change if self.change < float("inf") else None
        told = {"tokens": self.tokens, "corpus_sha256": self.corpus}
        return {**told, "last_change": change, "settled": settled}


@dataclass
class _Growing:
    """C of one layer, as tokens come."""

    total: Tensor | None = None  # (d_in, d_in) float64, sum of k k^T
    tokens: int = 0
    change: float = float("inf")
    _before: Tensor | None = None  # C as it was before this round

    def take(self, keys: Tensor) -> None:
        """Add the (t, d_in) keys of a window."""
        if self.total is None:
            self.total = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
        wide = keys.double().cpu()
        self.total.addmm_(wide.T, wide)
        self.tokens += len(keys)

    def look(self) -> None:
        """End a round."""
        assert self.total is not None
        now = self.total / self.tokens
        if self._before is not None:
            self.change = float((now - self._before).norm() / self._before.norm())
        self._before = now

    @property
    def settled(self) -> bool:
        """Say whether more text would change little."""
        enough = self.total is not None and self.tokens >= ENOUGH * len(self.total)
        return enough and self.change < SETTLED

    def result(self, corpus: str) -> Statistics:
        """Return C, if it is of enough tokens and of numbers."""
        assert self._before is not None
        require_seen(self.tokens, len(self._before))
        require_finite(self._before)
        return Statistics(self._before, self.tokens, corpus, self.change)


@dataclass
class Library:
    """Statistics of a model over one text, by layer: remembered, or gathered when asked for."""

    source: Source
    places: dict[str, Place]
    corpus: Corpus
    keys: Keys
    matrices: dict[int, str]  # by layer, the matrix whose inputs count
    say: Callable[[str], None]  # hears how far it is
    notes: list[str] = field(default_factory=list)
    _digests: dict[str, str] = field(default_factory=dict)

    def of(self, layers: Iterable[int]) -> dict[int, Statistics]:
        """Return the statistics of these layers."""
        wanted = sorted(layers)
        files = {layer: self._file(layer) for layer in wanted}
        found = {layer: self._recalled(files[layer]) for layer in wanted}
        missing = [layer for layer in wanted if found[layer] is None]
        made = self._gathered(missing) if missing else {}
        for layer, statistics in made.items():
            self._remember(files[layer], layer, statistics)
        return {layer: found[layer] or made[layer] for layer in wanted}

    def _gathered(self, layers: list[int]) -> dict[int, Statistics]:
        growing = {layer: _Growing() for layer in layers}
        for lot in self.corpus.rounds(ROUND):
            going = [layer for layer in layers if not growing[layer].settled]
            if not going:
                break
            for layer, keys in self.keys(lot, going):
                growing[layer].take(keys)
            for layer in going:
                growing[layer].look()
            self.say(_progress({layer: growing[layer] for layer in going}))
        return {layer: growing[layer].result(self.corpus.sha256) for layer in layers}

    def _file(self, layer: int) -> Path:
        """Return where the statistics of a layer are remembered."""
        below = [
            (name, self._digest(name))
            for name, place in sorted(self.places.items())
            if place.role != "head" and (place.layer is None or place.layer <= layer)
        ]
        config = json.dumps(self.source.config, sort_keys=True)
        rule = [FORMAT, SETTLED, ROUND, ENOUGH]
        words = [below, config, self.corpus.identity, self.matrices[layer], rule]
        key = hashlib.sha256(json.dumps(words).encode()).hexdigest()
        return cache_folder() / "statistics" / f"{key}.safetensors"

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = tensor_hash(self.source, name)
        return self._digests[name]

    def _recalled(self, path: Path) -> Statistics | None:
        """Return what was remembered, if it is whole."""
        if not path.exists():
            return None
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self.notes.append(f"{path} is damaged ({error}); its statistics were gathered anew")
            return None

    def _remember(self, path: Path, layer: int, statistics: Statistics) -> None:
        """Write statistics whole or not at all; where that cannot be, only time is lost."""
        words = {
            "layer": str(layer),
            "tokens": str(statistics.tokens),
            "corpus": statistics.corpus,
            "change": repr(statistics.change),
            "sha256": _sha256(statistics.second),
        }
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"second": statistics.second}, draft, words)
            os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            self.notes.append(f"{path} could not be written ({error}); statistics are not kept")
        finally:
            with suppress(OSError):
                draft.unlink()


def _progress(growing: Mapping[int, _Growing]) -> str:
    tokens = max(layer.tokens for layer in growing.values())
    change = max(layer.change for layer in growing.values())
    moved = f", changed by {change:.2%} in the last round" if change < float("inf") else ""
    return f"statistics of layers {', '.join(map(str, growing))}: {tokens:,} tokens{moved}"


def _read(path: Path) -> Statistics:
    with safe_open(path, "pt") as file:
        words, second = file.metadata() or {}, file.get_tensor("second")
    if _sha256(second) != words["sha256"]:
        raise ValueError("its bytes are not those that were written")
    return Statistics(second, int(words["tokens"]), words["corpus"], float(words["change"]))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(view_of(tensor)).hexdigest()
