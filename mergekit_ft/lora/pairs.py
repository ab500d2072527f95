"""What could have changed between two checkpoints: each tensor with its counterpart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import role_of
from mergekit_ft.registry import nearest
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.skeleton import Kind, Skeleton


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and the one that answers for it in the tuned model."""

    name: str  # in the checkpoint of the base
    base: TensorInfo
    tuned: TensorInfo
    kind: Kind
    model_name: str  # as transformers calls it

    @property
    def module(self) -> str:
        """Return the module that holds it."""
        return self.model_name.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        """Say whether it is a bias."""
        return self.model_name.rpartition(".")[2] == "bias"

    @property
    def reshaped(self) -> bool:
        """Say whether the tuned model has other rows."""
        return self.base.shape != self.tuned.shape

    @property
    def wide(self) -> bool:
        """Say whether one of the two holds float64."""
        return "F64" in (self.base.dtype, self.tuned.dtype)


class Pairs(Mapping[str, Pair]):
    """Every tensor of the base with its counterpart; what has none is told."""

    def __init__(self, base: Source, tuned: Source, skeleton: Skeleton) -> None:
        self.base, self.tuned, self.skeleton = base, tuned, skeleton
        self._require_all()
        self.added = [name for name in tuned if base.locate(name) is None]  # the tuned's alone
        self._require_tied()
        aliases = {name for name, to in base.ties.items() if name in base and to in base}
        self._pairs = {name: self._pair(name) for name in base if name not in aliases}

    def __getitem__(self, name: str) -> Pair:
        return self._pairs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def aliases(self, name: str) -> list[str]:
        """Return the other names of a tensor of the base."""
        return sorted(tied for tied, to in self.base.ties.items() if to == name)

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, Pair]]:
        """Return the tensors of each module by the model's names, those that are tied too."""
        found: dict[str, dict[str, Pair]] = {}
        for pair in self._pairs.values():
            tied = (a for a in self.aliases(pair.name) if self.skeleton.knows(a))
            for name in (pair.model_name, *map(self.skeleton.rename, tied)):
                found.setdefault(name.rpartition(".")[0], {})[name] = pair
        return found

    def _pair(self, name: str) -> Pair:
        info, answering = self.base[name], self.tuned.locate(name)
        assert answering is not None
        other = self.tuned[answering]
        if info.shape != other.shape and not _rows_alone(name, info, other):
            raise SourceError(
                f"{self.tuned.reference}: {answering} has shape {list(other.shape)}, and "
                f"{list(info.shape)} in {self.base.reference}: the two are not a base and a model "
                "that was tuned from it"
            )
        if (info.dtype in FLOATING) != (other.dtype in FLOATING):
            raise SourceError(
                f"{self.tuned.reference}: {answering} is {other.dtype}, and {info.dtype} in "
                f"{self.base.reference}: they have no difference"
            )
        kind = self.skeleton.kind(name, info.shape)
        plain = kind if info.dtype in FLOATING and info.shape == other.shape else "other"
        return Pair(name, info, other, plain, self.skeleton.rename(name))

    def _require_all(self) -> None:
        """Refuse a tuned model that lacks tensors of the base."""
        missing = [name for name in self.base if self.tuned.locate(name) is None]
        if missing:
            near = nearest(missing[0], self.tuned)
            hint = f" (nearest to {missing[0]}: {', '.join(near)})" if near else ""
            raise SourceError(
                f"{self.tuned.reference}: lacks {len(missing)} of the {len(self.base)} tensors of "
                f"{self.base.reference}: {listed(missing)}{hint}; is it a whole model, tuned from "
                "that base?"
            )

    def _require_tied(self) -> None:
        """Refuse a tuned model in which two names, one tensor in the base, are two."""
        for name, to in self.base.ties.items():
            both = name in self.tuned and to in self.tuned
            if both and to in self.base and not _equal(self.tuned, name, to):
                raise SourceError(
                    f"{self.tuned.reference}: {name} and {to} differ, and {self.base.reference} "
                    "ties them: save the base with tie_word_embeddings false and both tensors, "
                    "and name that"
                )


def _rows_alone(name: str, one: TensorInfo, other: TensorInfo) -> bool:
    """Say whether two tables differ in their number of tokens and in nothing else."""
    return (
        role_of(name) in ("embedding", "head")
        and len(one.shape) == len(other.shape)
        and one.shape[1:] == other.shape[1:]
    )


def _equal(source: Source, one: str, other: str) -> bool:
    """Say whether two tensors hold the same bytes."""
    mine, theirs = source[one], source[other]
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return False
    step = 1 << 20
    return all(
        _bytes(source, mine, at, step) == _bytes(source, theirs, at, step)
        for at in range(0, mine.nbytes, step)
    )


def _bytes(source: Source, info: TensorInfo, start: int, step: int) -> bytearray:
    data = bytearray(min(step, info.nbytes - start))
    source.read_into(info.name, start, memoryview(data))
    return data
