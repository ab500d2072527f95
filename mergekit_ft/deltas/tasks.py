"""Which tensors of a base and of several tasks' models are packed; all faults are told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mergekit_ft.deltas.pairs import Choice, Pair, paired
from mergekit_ft.errors import SourceError
from mergekit_ft.resolution import Ref
from mergekit_ft.sources import Source
from mergekit_ft.sources.patched import tensor_hash

Kind = Literal["emr", "tall"]
TOLD = 10  # faults


@dataclass(frozen=True)
class Asked:
    """What is packed, and how."""

    method: Kind
    threshold: float
    exclude: tuple[str, ...]  # globs of tensors that stay as the base has them
    tuned: Mapping[str, Source]  # by task


@dataclass(frozen=True)
class Row:
    """One tensor of the base and of every task's model."""

    pair: Pair  # of the first task
    base: Ref
    tuned: tuple[Ref, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Return what its arithmetic is done in."""
        wide = any(ref.info.dtype == "F64" for ref in (self.base, *self.tuned))
        return torch.float64 if wide else torch.float32

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name under which the base's files hold it."""
        return (self.pair.name, *self.pair.also)


def rows_of(base: Source, asked: Asked) -> Iterator[Row]:
    """Yield the tensors that are packed; what cannot be is told at once."""
    faults: list[str] = []
    choice = Choice(exclude=asked.exclude)
    by_task = [_paired(base, source, choice, faults) for source in asked.tuned.values()]
    if not faults:
        faults += [fault for pairs in by_task for fault in _stiff(pairs)]
    if faults:
        more = f"\nand {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        raise SourceError("\n".join(faults[:TOLD]) + more)
    for pairs in zip(*by_task, strict=True):
        if not pairs[0].why and pairs[0].numel:
            assert pairs[0].base is not None
            yield Row(pairs[0], pairs[0].base, tuple(pair.tuned for pair in pairs))


def _paired(base: Source, tuned: Source, choice: Choice, faults: list[str]) -> list[Pair]:
    """Pair every tensor of one task's model with the base's."""
    try:
        pairs = paired(base, tuned, choice).pairs
    except SourceError as error:
        faults.append(str(error))
        return []
    for pair in pairs:
        if pair.why and not _alike(pair):
            faults.append(
                f"{tuned.reference}: {pair.name} is {pair.why}, and tasks of a pack have the "
                f"base's tensors; --exclude {pair.name} leaves it as the base has it"
            )
    return pairs


def _alike(pair: Pair) -> bool:
    if pair.base is None:
        return False
    mine, theirs = pair.base.info, pair.tuned.info
    return (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)


def _stiff(pairs: Sequence[Pair]) -> Iterator[str]:
    """Tell of tensors that hold no floats, and differ: nothing can be added to them."""
    for pair in pairs:
        if pair.why and pair.base is not None:
            mine = tensor_hash(pair.base.source, pair.base.name)
            if mine != tensor_hash(pair.tuned.source, pair.tuned.name):
                yield (
                    f"{pair.tuned.source.reference}: {pair.name} ({pair.tuned.info.dtype}) differs "
                    "from the base's, and only floats are packed"
                )
