"""One adapter out of several, in the space of their deltas: the sum, its nearest, or an operator's.

concat  B = [w_1 s_1 B_1 .. w_T s_T B_T], A = [A_1; ..; A_T]: the weighted sum itself
svd     the nearest to that sum of a rank, or of the least rank that keeps an energy
core    an operator on the core matrices (see core.py), cut by rank or energy where asked
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ft.algebra import spectra
from mergekit_ft.errors import OperatorError, WriteError
from mergekit_ft.lora import core, measuring, receipts, reports
from mergekit_ft.lora.asked import MergeAsked
from mergekit_ft.lora.carried import Carried
from mergekit_ft.lora.folder import AdapterFolder
from mergekit_ft.lora.members import Members, members, notes
from mergekit_ft.lora.words import config_words
from mergekit_ft.options import Progress, Unwatched
from mergekit_ft.sources import Adapter
from mergekit_ft.sources.adapter import PREFIX
from mergekit_ft.sources.adapter_config import NAME
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.sides import RECEIPT
from mergekit_ft.sources.tiles import one_thread

VANISHED = 1e-24  # share of the members' energy below which their sum is rounding


@dataclass
class Merged:
    """A module of the result."""

    module: str
    shape: tuple[int, int]  # (out, in)
    rank: int
    total: float  # energy of what was to be written
    kept: float  # energy of the product that was
    how: str
    share: float = 0.0  # of the energy, by the written files
    residual: float = 0.0

    def told(self, share: float, residual: float) -> None:
        """Take what the written files give."""
        self.share, self.residual = share, residual

    def words(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "module": self.module,
            "shape": list(self.shape),
            "rank": self.rank,
            "parameters": self.rank * sum(self.shape),
            "energy": self.share,
            "residual": self.residual,
            "svd": self.how,
        }


def merge(
    adapters: Sequence[Adapter], out: Path, asked: MergeAsked, watcher: Progress | None = None
) -> dict[str, Any]:
    """Write the merge of adapters to `out` and return its report; raises, leaving nothing."""
    held = members(adapters, asked.weights)
    if len(held) == 1 and (out / NAME).is_file() and not (out / RECEIPT).is_file():
        raise WriteError(
            f"{out} is an adapter that was not merged here, and would be replaced by {held[0]} "
            "alone; the folder to be made comes after the adapters"
        )
    return _Run(held, out, asked, watcher or Unwatched()).report()


class _Run:
    """One merge."""

    def __init__(self, held: Members, out: Path, asked: MergeAsked, watcher: Progress) -> None:
        self.held, self.asked, self.watcher = held, asked, watcher
        self.carried = Carried(held, asked.others, summed=asked.space is None)
        read = [member.adapter.folder for member in held]
        self.folder = AdapterFolder(out, read, overwrite=asked.overwrite)
        self.merged: list[Merged] = []
        self.vanished: list[str] = []
        self.cores: Mapping[str, Tensor] = {}

    def report(self) -> dict[str, Any]:
        """Merge, write, read back, commit."""
        self._require_room()
        hashing = receipts.Inputs([member.adapter for member in self.held], 1)
        with one_thread(), self.folder, hashing:
            moved = sum(info.nbytes for m in self.held for info in m.adapter.tensors.values())
            self.watcher.start(2 * moved, f"merging into {self.folder.out}")
            if (space := self.asked.space) is not None:
                words, own = self.asked.plan(), self.asked.parameters_of_each(len(self.held))
                self.cores = core.merged_cores(self.held, space, words, own, self.asked.memory)
            for module in self.held.shapes:
                self._write(module)
            self._require_some()
            self.carried.write(self.folder, {found.module for found in self.merged})
            self.folder.seal(self._words(), NAME)
            adapter = measuring.measure(self.folder.part, self._checks(), 1)
            adapter.reader.close()
            report = self._report()
            shown = {key: value for key, value in report.items() if key != "out"}
            card, kept = reports.merge_card(report), self.asked.kept()
            receipts.surround(self.folder, "lora merge", kept, shown, card, hashing)
        return report

    def _target(self, module: str) -> tuple[Tensor, ...]:
        """Return factors whose product is what is to be written, in float64."""
        if self.asked.space is None:
            return self.held.stacked(module)
        basis = core.bases(self.held, module, self.asked.space)
        return core.product(basis, self.cores[module])

    def _write(self, module: str) -> None:
        """Write the factors of a module, unless nothing of it is left."""
        left, right = self._target(module)
        total = spectra.product_energy(left, right)
        if total <= VANISHED * self._energy(module):
            self.vanished.append(module)
            return
        kept = total
        if self.asked.method != "concat":
            cut = spectra.of_product(left, right, self.asked.rank, self.asked.energy)
            left, right, kept = cut.left, cut.right, cut.kept
        table = self.held.is_table(module)
        stem, end = f"{PREFIX}{module}.lora_", ".weight"
        if table:
            stem, end = f"{stem}embedding_", ""
        self.folder.append(f"{stem}A{end}", right.float())
        self.folder.append(f"{stem}B{end}", left.float())
        how = self.asked.space or ("sum" if self.asked.method == "concat" else "exact")
        shape = self.held.shapes[module]
        self.merged.append(Merged(module, shape, left.shape[1], total, kept, how))
        self.watcher.advance(8 * left.shape[1] * sum(shape))

    def _energy(self, module: str) -> float:
        """Return the energies of the members' own deltas, added up."""
        each = [member.factors(module) for member in self.held]
        return sum(spectra.product_energy(*found) for found in each if found is not None)

    def _checks(self) -> Iterator[measuring.Check]:
        for found in self.merged:
            again = partial(self._target, found.module)
            yield found.module, found.total, found.kept, again, found.told

    def _require_some(self) -> None:
        if not self.merged:
            raise OperatorError(
                f"the merge is zero in all {len(self.held.shapes)} modules: its weights or its "
                "operator leave nothing of the adapters"
            )

    def _require_room(self) -> None:
        need = {
            module: 8 * (4 * sum(shape) * self.held.ranks(module) + 2 * measuring.ROWS * shape[1])
            for module, shape in self.held.shapes.items()
        }
        name = max(need, key=lambda module: need[module])
        if need[name] > self.asked.memory:
            raise OperatorError(
                f"{name}: the factors of {len(self.held)} adapters take {need[name]:,} bytes, more "
                f"than the {self.asked.memory:,} given; raise --memory"
            )

    def _words(self) -> dict[str, Any]:
        told = [member.words for member in self.held]
        tasks = {words.get("task_type") for words in told if words.get("task_type")}
        bases = [member.adapter.config.base for member in self.held if member.adapter.config.base]
        revisions = {words.get("revision") for words in told}
        return config_words(
            {found.module: found.rank for found in self.merged},
            base=bases[0] if bases else None,
            revision=revisions.pop() if len(revisions) == 1 and len(set(bases)) == 1 else None,
            saved=self.carried.modules(),
            biased=self.carried.biased,
            transposed=any(member.adapter.config.transposed for member in self.held),
            task=tasks.pop() if len(tasks) == 1 else None,
        )

    def _report(self) -> dict[str, Any]:
        found = [merged.words() for merged in self.merged]
        bases = [member.adapter.config.base for member in self.held if member.adapter.config.base]
        return {
            "out": str(self.folder.out),
            "base": bases[0] if bases else None,
            "adapters": [
                {
                    "reference": str(member),
                    "weight": member.weight,
                    "modules": len(member.adapter.factors),
                    "ranks": sorted({f.a.shape[0] for f in member.adapter.factors.values() if f.a}),
                }
                for member in self.held
            ],
            "asked": self.asked.words(),
            "matrices": found,
            "carried_over": list(self.carried.taken),
            "left_out": dict(self.carried.left),
            "vanished": self.vanished,
            "selectors": {},
            "totals": reports.totals(found, [merged.total for merged in self.merged]),
            "bytes": self.folder.nbytes,
            "notes": list(self._notes()),
        }

    def _notes(self) -> Iterator[str]:
        yield from notes(self.held)
        yield from self.carried.notes()
        idle = [str(member) for member in self.held if member.weight == 0.0]
        if idle:
            yield f"of weight 0, so without effect: {listed(idle)}"
        if self.vanished:
            yield f"zero in the merge, so without factors: {listed(self.vanished)}"
