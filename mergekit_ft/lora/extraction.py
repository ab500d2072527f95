"""An adapter from a tuned model: the nearest product of low rank to the delta of each matrix."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.algebra import spectra
from mergekit_ft.blocks import Crew, Job, Station
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.lora import changes, measuring, receipts, reports
from mergekit_ft.lora.asked import ExtractAsked
from mergekit_ft.lora.folder import AdapterFolder
from mergekit_ft.lora.others import Others
from mergekit_ft.lora.pairs import Pair, Pairs
from mergekit_ft.lora.selection import Selectors
from mergekit_ft.lora.words import by_number, config_words, task_type
from mergekit_ft.options import Progress, Unwatched
from mergekit_ft.sources import Source, adapted
from mergekit_ft.sources.adapter import PREFIX
from mergekit_ft.sources.adapter_config import NAME
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.skeleton import skeleton

SKETCHED = 3072  # a shorter side from which on a sketch is quicker than the whole spectrum
CPU = torch.device("cpu")


@dataclass
class Matrix:
    """A matrix that changed, and the product that stands for its change."""

    pair: Pair
    rank: int
    total: float  # energy of the delta
    kept: float  # energy of the product
    svd: str
    iterations: int
    gain: float
    share: float = 0.0  # of the energy that is kept, by the written files
    residual: float = 0.0  # |delta - product| / |delta|, by the written files

    def told(self, share: float, residual: float) -> None:
        """Take what the written files give."""
        self.share, self.residual = share, residual

    def words(self) -> dict[str, Any]:
        """Return what a report says of it."""
        rows, columns = self.pair.base.shape
        return {
            "module": self.pair.module,
            "tensor": self.pair.name,
            "shape": [rows, columns],
            "rank": self.rank,
            "parameters": self.rank * (rows + columns),
            "energy": self.share,
            "residual": self.residual,
            "svd": self.svd,
            "iterations": self.iterations,
            "gain": self.gain,
        }


@dataclass
class Extraction:
    """What was found and written."""

    out: Path
    report: dict[str, Any]


def extract(
    base: Source, tuned: Source, out: Path, asked: ExtractAsked, watcher: Progress | None = None
) -> Extraction:
    """Write the adapter of tuned - base to `out`; raises, and leaves nothing, where it cannot."""
    return _Run(base, tuned, out, asked, watcher or Unwatched()).extraction()


class _Run:
    """One extraction."""

    def __init__(
        self, base: Source, tuned: Source, out: Path, asked: ExtractAsked, watcher: Progress
    ) -> None:
        self.base, self.tuned, self.asked, self.watcher = base, tuned, asked, watcher
        self.skeleton = skeleton(base)
        self.pairs = Pairs(base, tuned, self.skeleton)
        self.selectors = Selectors(asked.include, asked.exclude)
        known = [*self.pairs, *self.pairs.added]
        self.chosen = self.selectors.chosen(known)
        read = [path for source in (base, tuned) for path in receipts.places(source)]
        self.folder = AdapterFolder(out, read, overwrite=asked.overwrite)
        self.matrices: dict[str, Matrix] = {}  # by tensor
        self.left: dict[str, float] = {}  # changed tensors that are left out -> energy
        self.others = Others(self.pairs)

    def extraction(self) -> Extraction:
        """Find, write, read back, commit."""
        self._require_known()
        threads = self._threads()
        hashing = receipts.Inputs((self.base, self.tuned), threads)
        with self.folder, hashing:
            self._watch()
            Crew(threads, CPU).run(self._jobs())
            self._require_change()
            self.others.write(self.folder, {held.pair.module for held in self.matrices.values()})
            self.folder.seal(self._words(), NAME)
            adapter = measuring.measure(self.folder.part, self._checks(), threads)
            if not self.others.reshaped:
                adapted(self.base, adapter)  # every tensor finds its place, or this raises
            adapter.reader.close()
            report = self._report()
            shown = {key: value for key, value in report.items() if key != "out"}
            card = reports.extraction_card(report)
            receipts.surround(self.folder, "lora extract", self.asked.kept(), shown, card, hashing)
        return Extraction(self.folder.out, report)

    def _jobs(self) -> Iterator[Job]:
        for name, pair in self.pairs.items():
            whole = pair.kind != "other" and name in self.chosen
            yield self._job(pair, self._decompose if whole else self._look)

    def _job(self, pair: Pair, work: Any) -> Job:
        def piece(station: Station) -> None:
            work(pair)
            self.watcher.advance(pair.base.nbytes + pair.tuned.nbytes)

        yield [piece]

    def _decompose(self, pair: Pair) -> None:
        """Write the factors of a matrix, unless it did not change."""
        delta = changes.delta(self.base, self.tuned, pair)
        if not bool(delta.any()):
            return
        product = self._product(pair, delta)
        prefix = f"{PREFIX}{pair.module}.lora_"
        self.folder.append(f"{prefix}A.weight", product.right.float())
        self.folder.append(f"{prefix}B.weight", product.left.float())
        self.matrices[pair.name] = Matrix(
            pair,
            product.rank,
            product.total,
            product.kept,
            "randomised" if product.iterations else "exact",
            product.iterations,
            product.gain,
        )

    def _product(self, pair: Pair, delta: torch.Tensor) -> spectra.Product:
        rank, energy = self.asked.rank, self.asked.energy
        if rank is not None and self._sketched(min(delta.shape)):
            key = f"{self.asked.seed}\0{pair.name}"
            return spectra.by_sketch(delta, rank, energy, key)
        return spectra.by_gram(delta, rank, energy)

    def _sketched(self, short: int) -> bool:
        if self.asked.svd != "auto" or self.asked.rank is None:
            return self.asked.svd == "randomised"
        return short >= SKETCHED and 8 * (self.asked.rank + spectra.OVERSAMPLED) <= short

    def _look(self, pair: Pair) -> None:
        """Note a tensor that is no matrix, or was not chosen, where it changed."""
        found = changes.energy(self.base, self.tuned, pair)
        if not found and not pair.reshaped:
            return
        if pair.name not in self.chosen or self.asked.others == "skip":
            self.left[pair.name] = found
            return
        if not self.skeleton.knows(pair.name):
            raise self._no_place(pair)
        self.others.add(pair, found)

    def _no_place(self, pair: Pair) -> SourceError:
        """Say that a tensor changed which the model's class holds otherwise, as it does experts."""
        alike = [n for n in self.pairs if n in self.chosen and not self.skeleton.knows(n)]
        return SourceError(
            f"{self.tuned.reference}: {pair.name} changed, and transformers' model has no tensor "
            f"of that name ({len(alike)} of {len(self.pairs)} are such), so an adapter on it would "
            "not load; leave them out (--exclude, or --others skip)"
        )

    def _require_known(self) -> None:
        """Refuse, before a weight is read, what could have no place in an adapter."""
        added = [name for name in self.pairs.added if name in self.chosen]
        if added and self.asked.others != "skip":
            raise SourceError(
                f"{self.tuned.reference}: {listed(added)} stand in no tensor of "
                f"{self.base.reference}, so an adapter has no place for them; leave them out "
                "(--exclude, or --others skip), or add them to the base"
            )
        if added:
            self.left |= dict.fromkeys(added, 0.0)

    def _require_change(self) -> None:
        if self.asked.others == "refuse" and self.others:
            raise OperatorError(
                f"{self.tuned.reference}: {listed(self.others.names())} changed and are no "
                "matrices of linear layers; --others save keeps them whole, skip leaves them out"
            )
        if not self.matrices:
            left = f" besides what is left out ({listed(self.left)})" if self.left else ""
            more = f" but {listed(self.others.names())}" if self.others else left
            raise OperatorError(
                f"{self.tuned.reference}: no matrix of a linear layer differs from "
                f"{self.base.reference}{more}: there is nothing to extract"
            )
        self.others.require_savable(self.matrices)

    def _threads(self) -> int:
        """Return how many matrices are held at once; refuse where one is too much."""
        wanted = self.asked.threads or min(8, os.cpu_count() or 1)
        rank = self.asked.rank if self.asked.svd == "randomised" else None
        needs = {pair.name: changes.whole_bytes(pair, rank) for pair in self._decomposed()}
        if not needs:
            return wanted
        name = max(needs, key=lambda held: needs[held])
        if needs[name] > self.asked.memory:
            raise OperatorError(
                f"{name}: a matrix is held whole, and this one takes {needs[name]:,} bytes, more "
                f"than the {self.asked.memory:,} given; raise --memory, or leave it out (--exclude)"
            )
        return max(1, min(wanted, self.asked.memory // needs[name]))

    def _decomposed(self) -> Iterable[Pair]:
        return (p for n, p in self.pairs.items() if p.kind != "other" and n in self.chosen)

    def _watch(self) -> None:
        once = sum(pair.base.nbytes + pair.tuned.nbytes for pair in self.pairs.values())
        again = sum(pair.base.nbytes + pair.tuned.nbytes for pair in self._decomposed())
        whole = max((changes.whole_bytes(p, None) for p in self._decomposed()), default=0)
        self.watcher.start(
            once + again, f"extracting into {self.folder.out} (a matrix takes {whole:,} bytes)"
        )

    def _checks(self) -> Iterator[measuring.Check]:
        for held in self.matrices.values():
            again = partial(self._again, held.pair)
            yield held.pair.module, held.total, held.kept, again, held.told
            self.watcher.advance(held.pair.base.nbytes + held.pair.tuned.nbytes)

    def _again(self, pair: Pair) -> tuple[torch.Tensor]:
        return (changes.delta(self.base, self.tuned, pair),)

    def _report(self) -> dict[str, Any]:
        held = [self.matrices[name] for name in sorted(self.matrices, key=by_number)]
        found = reports.totals([matrix.words() for matrix in held], [m.total for m in held])
        everything = math.fsum(
            [*(m.total for m in held), *self.others.found.values(), *self.left.values()]
        )
        kept = math.fsum([*(m.total * m.share for m in held), *self.others.found.values()])
        tables = [self.pairs[name].tuned.shape[0] for name in self.others.reshaped]
        changed = len(held) + len(self.others.found) + len(self.left)
        return {
            "out": str(self.folder.out),
            "base": str(self.base),
            "tuned": str(self.tuned),
            "asked": self.asked.words(),
            "matrices": [matrix.words() for matrix in held],
            "saved_modules": self.others.modules,
            "saved_biases": sorted(self.others.biases),
            "left_out": {n: self.left[n] / everything for n in sorted(self.left)},
            "unchanged": len(self.pairs) - changed + len(set(self.left) - set(self.pairs)),
            "selectors": self.selectors.matches,
            "totals": found | {"energy_of_all_changes": kept / everything},
            "rows": tables[0] if tables else None,
            "bytes": self.folder.nbytes,
            "notes": list(self._notes(kept / everything)),
        }

    def _notes(self, share: float) -> Iterator[str]:
        if self.skeleton.note:
            yield self.skeleton.note
        if self.others:
            yield f"kept whole, changed and no matrices: {listed(self.others.names())}"
        for name in self.others.reshaped:
            rows, before = self.pairs[name].tuned.shape[0], self.pairs[name].base.shape[0]
            yield (
                f"{name} has {rows} rows, and {before} in the base: resize the base's embeddings "
                f"to {rows} before the adapter is loaded"
            )
        if self.left:
            yield (
                f"left out, though changed: {listed(sorted(self.left))}; of the energy of all "
                f"changes {share:.6f} is kept"
            )

    def _words(self) -> dict[str, Any]:
        matrices = self.matrices.values()
        ranks = {matrix.pair.module: matrix.rank for matrix in matrices}
        unchanged = {p.module for p in self.pairs.values() if p.name not in self.matrices}
        known = self.skeleton.kinds or unchanged
        return config_words(
            ranks,
            base=receipts.name_of(self.base),
            revision=self.base.revision,
            saved=self.others.modules,
            biased=bool(self.others.biases),
            transposed=any(matrix.pair.kind == "conv1d" for matrix in matrices),
            task=task_type(self.base),
            others=[module for module in known if module not in ranks],
        )
