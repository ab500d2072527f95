"""What a tuned model changes in its base, as a delta file: all that differs, or the largest part.

Top-k keeps the k largest |tuned - base| (taken in float32, in float64 where a tensor has that), of
equal ones the first in the order of the base's tensors and of their elements. A sample guesses what
the k-th reaches, one pass spools what does, counting finds the k-th among that, and what is kept
goes from the spool into the file. Where the guess was too high everything that differs is spooled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergekit_ft.algebra.selection import count_for
from mergekit_ft.blocks import Crew, Job, Piece, Station
from mergekit_ft.deltas.candidates import (
    Found,
    Search,
    Spool,
    bits_of,
    block_size,
)
from mergekit_ft.deltas.cuts import Cut, cut_of
from mergekit_ft.deltas.pairs import Choice, Pair, Pairing, paired
from mergekit_ft.deltas.reach import Reach, guessed
from mergekit_ft.deltas.storing import Store, with_digests
from mergekit_ft.deltas.writing import DeltaWriter
from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.patched import tensor_hash

Scope = Literal["model", "tensor"]
COARSE = 0.1  # share of the entries kept that are tied at the threshold, worth a remark
FEW = 2**20  # elements of which no sample is taken: all that differ are spooled


@dataclass(frozen=True)
class Asked:
    """How much is kept: a share or a number of entries, or all that differ."""

    density: float | None = None
    k: int | None = None
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if self.density is not None and self.k is not None:
            raise PlanError("--density and --k both say how much is kept; give one of them")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise PlanError(f"--density {self.density}: a share is above 0 and at most 1")
        if self.k is not None and self.k < 1:
            raise PlanError(f"--k {self.k}: at least one entry must be kept")
        if self.scope == "tensor" and self.density is None:
            raise PlanError("--scope tensor ranks within each tensor, so it needs --density")

    @property
    def ranked(self) -> bool:
        """Say whether only the largest are kept."""
        return self.k is not None or self.density not in (None, 1.0)

    def count(self, numel: int) -> int:
        """Return how many of the entries are kept."""
        if self.density is None:
            return numel if self.k is None else self.k
        return count_for(self.density, numel) or numel


@dataclass(frozen=True)
class Extracted:
    """What a delta file holds of a tuned model."""

    out: Path
    entries: int  # kept
    considered: int  # among so many
    tensors: list[str]  # that change
    whole: Mapping[str, str]  # stored whole, and why
    unchanged: int  # tensors that the delta leaves alone, those left out apart
    excluded: list[str]
    threshold: float | None  # the least |tuned - base| that is kept, where one rank serves all
    energy: float | None  # share of the delta's squared norm that is kept
    nbytes: int
    notes: list[str] = field(default_factory=list)


def extract(
    base: str,
    tuned: str,
    out: str | os.PathLike[str],
    *,
    density: float | None = None,
    k: int | None = None,
    scope: Scope = "model",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dense: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Extracted:
    """Write what `tuned` changes in `base` to the delta file `out`.

    Options are fields of `Options`. Raises `MergekitError` and leaves no `out` behind.
    """
    asked = Asked(density, k, scope)
    chosen, watcher = Options(**options), progress or Unwatched()
    opening: dict[str, Any] = {"offline": chosen.offline, "allow_pickle": chosen.allow_pickle}
    with open_source(base, **opening) as mine, open_source(tuned, **opening) as theirs:
        choice = Choice(tuple(include), tuple(exclude), tuple(dense))
        return between(mine, theirs, Path(out), asked, choice, chosen, watcher)


def between(
    base: Source,
    tuned: Source,
    out: Path,
    asked: Asked,
    choice: Choice,
    options: Options,
    watcher: Progress,
    told: Mapping[str, Any] | None = None,
) -> Extracted:
    """Write what one source changes in another; `told` are words to put in those of the file."""
    pairing = paired(base, tuned, choice)
    with DeltaWriter(out, overwrite=options.overwrite) as writer:
        return _Extraction(pairing, asked, choice, options, watcher, writer, told or {}).run()


class _Extraction:
    """One extraction under way."""

    def __init__(
        self,
        pairing: Pairing,
        asked: Asked,
        choice: Choice,
        options: Options,
        watcher: Progress,
        writer: DeltaWriter,
        told: Mapping[str, Any],
    ) -> None:
        self.pairing, self.asked, self.choice, self.told = pairing, asked, choice, told
        self.watcher, self.writer = watcher, writer
        wide = bits_of(pairing.sparse)
        self.size = block_size(wide, options.memory, options.workers)
        self.founds = [Found(pair, self._bits(pair, wide)) for pair in pairing.sparse if pair.numel]
        self.spool = Spool(writer.path.parent)
        self.crew = Crew(options.workers, options.torch_device)
        advance, lax = watcher.advance, options.allow_non_finite
        self.search = Search(self.spool, self.crew, self.size, advance, asked.ranked, lax)
        self.store = Store(writer, self.spool, self.size, advance, lax)
        self.cut: Cut | None = None  # of the whole model, where there is one
        self.cuts: dict[str, Cut | None] = {}  # of a tensor, by its name, where each has its own
        self.digests: dict[str, str] = {}

    def run(self) -> Extracted:
        """Find, choose, write."""
        with closing(self.spool):
            moved = sum(pair.nbytes for pair in self.pairing.pairs)
            self.watcher.start(moved, f"extracting {self.writer.path}")
            self._find()
            self._write()
            return self._commit()

    def _bits(self, pair: Pair, wide: int) -> int:
        """Return the bits of the floats that a tensor's differences are taken in."""
        if not self.asked.ranked:
            return 0
        return wide if self.asked.scope == "model" else bits_of([pair])

    def _find(self) -> None:
        """Spool what may be kept."""
        if self.asked.scope == "tensor" and self.asked.ranked:
            self.crew.run(self._within(found) for found in self.founds)
            return
        total = sum(found.pair.numel for found in self.founds)
        rank = self.asked.count(total)
        reach = self._reach(total, rank)
        self.search.over(self.founds, reach)
        if reach.lowest and sum(found.count for found in self.founds) < rank:
            self.search.over(self.founds, reach.lowered())

    def _reach(self, total: int, rank: int) -> Reach:
        if not self.asked.ranked or total <= FEW:
            return Reach(rank)
        rows, jobs = self.search.sampled(self.founds)
        self.crew.run(_job(pieces) for pieces in jobs if pieces)
        return guessed(np.concatenate(rows), total, rank)

    def _within(self, found: Found) -> Job:
        """Do all this for one tensor."""
        numel = found.pair.numel
        rank = self.asked.count(numel)
        reach = Reach(rank)
        if numel > FEW:
            rows, (pieces,) = self.search.sampled([found])
            yield pieces
            reach = guessed(np.concatenate(rows), numel, rank)
        yield from self.search.within(found, reach)
        if reach.lowest and found.count < rank:
            yield from self.search.within(found, reach.lowered())
        self.cuts[found.pair.name] = cut_of(self.spool, [found], rank, self.size)

    def _write(self) -> None:
        """Write what is kept, and hash what it is a change of, side by side."""
        touched = [found.pair for found in self.founds if found.count]
        touched += [pair for pair in self.pairing.whole if pair.base is not None]
        touched.sort(key=lambda pair: -pair.numel)
        self.crew.run([self._writing(), *(_job([self._hashing(pair)]) for pair in touched)])

    def _writing(self) -> Job:
        if self.asked.ranked and self.asked.scope == "model" and self.founds:
            yield [self._cutting]
        left = self.cut

        def entries(found: Found) -> Piece:
            def run(station: Station) -> None:
                nonlocal left
                own = self.cuts.get(found.pair.name) if self.cuts else left
                after = self.store.take(found, own, station)
                left = left if self.cuts else after

            return run

        for found in self.founds:
            if found.count:
                yield [entries(found)]
        for pair in self.pairing.whole:
            yield [self._whole(pair)]

    def _cutting(self, station: Station) -> None:
        """Find the cut for the whole model."""
        rank = self.asked.count(sum(found.pair.numel for found in self.founds))
        self.cut = cut_of(self.spool, self.founds, rank, self.size)

    def _whole(self, pair: Pair) -> Piece:
        return lambda station: self.store.take_whole(pair, station)

    def _hashing(self, pair: Pair) -> Piece:
        def run(station: Station) -> None:
            assert pair.base is not None
            digest = tensor_hash(pair.base.source, pair.base.name)
            self.digests.update(dict.fromkeys((pair.name, *pair.also), digest))

        return run

    def _commit(self) -> Extracted:
        store, pairing, cut = self.store, self.pairing, self.cut
        if not store.records:
            raise OperatorError(
                f"nothing changed: {pairing.tuned.reference} equals {pairing.base.reference} in "
                "every tensor that is looked at"
            )
        considered = sum(found.pair.numel for found in self.founds)
        energy = self._energy()
        notes = [*pairing.notes, *self._remarks(cut, considered)]
        words = _words(pairing, self.asked, self.choice, store, considered, energy)
        self.writer.commit({**words, **self.told}, with_digests(store.records, self.digests))
        seen = sum(1 + len(pair.also) for pair in pairing.pairs)
        return Extracted(
            self.writer.path,
            store.entries,
            considered,
            sorted(record.name for record in store.records),
            dict(sorted(store.whole.items())),
            seen - len(store.records),
            pairing.excluded,
            self._threshold(cut),
            energy,
            self.writer.path.stat().st_size,
            notes,
        )

    def _energy(self) -> float | None:
        """Return the share of the delta's squared norm that is kept."""
        if not self.asked.ranked:
            return 1.0
        total = math.fsum(found.energy for found in self.founds)
        share = math.fsum(self.store.squares) / total if total else 1.0
        return share if math.isfinite(share) else None

    def _threshold(self, cut: Cut | None) -> float | None:
        return cut.as_float(self.founds[0].bits) if cut is not None else None

    def _remarks(self, cut: Cut | None, considered: int) -> Iterator[str]:
        """Say where fewer entries differ than were asked for, or where many are equal."""
        if not self.asked.ranked or self.asked.scope == "tensor":
            return
        rank, tied = self.asked.count(considered), cut.quota if cut is not None else 0
        if self.store.entries < rank:
            yield f"only {self.store.entries:,} entries differ, of {rank:,} that were asked for"
        if tied > COARSE * rank:
            size = self._threshold(cut)
            yield (
                f"{tied / rank:.0%} of the entries kept are equally large ({size:g}); of such the "
                "first are taken, in the order of the tensors. --scope tensor spreads them, and a "
                "model tuned and saved in float32 has finer changes"
            )


def _job(pieces: list[Piece]) -> Job:
    yield pieces


def _words(
    pairing: Pairing,
    asked: Asked,
    choice: Choice,
    store: Store,
    considered: int,
    energy: float | None,
) -> dict[str, Any]:
    """Return what the file says of how it was made."""
    parameters = {
        "density": asked.density,
        "k": asked.k,
        "scope": asked.scope,
        "include": list(choice.include),
        "exclude": list(choice.exclude),
        "dense": list(choice.dense),
    }
    return {
        "base": _identity(pairing.base),
        "method": "extract",
        "parameters": parameters,
        "density": store.entries / considered if considered else None,
        "seed": None,
        "provenance": {
            "tuned": _identity(pairing.tuned),
            "energy_kept": energy,
            "stored_whole": dict(sorted(store.whole.items())),
            "left_out": pairing.excluded,
        },
    }


def _identity(source: Source) -> dict[str, str | None]:
    return {"id": source.reference, "revision": source.revision}
