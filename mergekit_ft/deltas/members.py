"""The deltas that a composition adds up: what of each goes in, and what cannot; from headers."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.registry import nearest
from mergekit_ft.sources.delta_file import SPARSE, Change, DeltaFile, open_delta
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.sources.layout import listed

READ = 1 << 20  # bytes at a time
Term = tuple[str | os.PathLike[str], float]  # a file and its weight


@dataclass(frozen=True)
class Member:
    """One delta of a composition."""

    delta: DeltaFile
    weight: float
    digest: str  # of the file

    @property
    def name(self) -> str:
        """Return the file as the user named it."""
        return self.delta.reference

    @property
    def dense(self) -> list[str]:
        """Return the tensors that it holds whole."""
        return [c.name for c in self.delta.changes.values() if c.kind == "dense"]


@dataclass
class Composition:
    """What is added up, tensor by tensor, and what is taken whole or left out."""

    members: list[Member]  # by digest, so that their order on the command line is forgotten
    head: Member | None  # the one whose whole tensors are taken
    sums: dict[str, list[Member]] = field(default_factory=dict)  # by tensor: who adds entries
    products: dict[str, list[Member]] = field(default_factory=dict)  # who adds low-rank products
    left_out: dict[str, list[str]] = field(default_factory=dict)  # by member: tensors not taken

    @property
    def whole(self) -> list[str]:
        """Return the tensors that are taken whole."""
        return sorted(self.head.dense) if self.head is not None else []

    def close(self) -> None:
        """Let go of every file."""
        for member in self.members:
            member.delta.close()


def opened(terms: Sequence[Term]) -> list[Member]:
    """Open every delta, in the order of their digests; all faults are told at once."""
    faults, members = [], []
    for path, weight in terms:
        named = os.fspath(path)
        if not math.isfinite(weight) or weight == 0.0:
            faults.append(
                f"{named}: weight {weight:g}: give a number other than 0, or leave it out"
            )
        members.append(Member(open_delta(Path(named).expanduser(), named), weight, _digest(named)))
    if len(members) < 1:
        raise PlanError("name at least one delta")
    members.sort(key=lambda member: member.digest)
    for one, other in pairwise(members):
        if one.digest == other.digest:
            faults.append(
                f"{one.name} and {other.name} are the same delta: name it once, with weight "
                f"{one.weight + other.weight:g}"
            )
    if faults:
        raise PlanError("\n".join(faults))
    return members


def composed_of(members: list[Member], head: str | None) -> Composition:
    """Return what becomes of every change of every member, or tell all that does not fit."""
    chosen = _head(members, head)
    found = Composition(members, chosen)
    whole = set(found.whole)
    faults = list(_packs(members))
    for name in sorted({name for member in members for name in member.delta.changes}):
        holders = [member for member in members if name in member.delta.changes]
        faults += _bases(name, holders)
        adding = [m for m in holders if m.delta.changes[name].kind != "dense"]
        left = [m for m in holders if m not in adding and m is not chosen]
        if name in whole and adding:
            left += adding
            if head is None:
                assert chosen is not None
                faults.append(
                    f"{name} is whole in {chosen.name}, and {adding[0].name} changes entries of "
                    f"it: --head {chosen.name} takes it from there alone"
                )
        elif adding:
            faults += _place(found, name, adding)
        for member in left:
            found.left_out.setdefault(member.name, []).append(name)
    if faults:
        raise SourceError("\n".join(faults))
    return found


def _place(found: Composition, name: str, adding: list[Member]) -> Iterator[str]:
    """Note who adds to a tensor; tell where entries and products would be mixed."""
    changes = [member.delta.changes[name] for member in adding]
    kinds = {change.kind in SPARSE for change in changes}
    if len(kinds) > 1:
        low = next(m.name for m in adding if m.delta.changes[name].kind == "low_rank")
        rest = next(m.name for m in adding if m.delta.changes[name].kind != "low_rank")
        yield (
            f"{name} changes by a low-rank product in {low} and by entries in {rest}, which have "
            "no exact sum that is small: merge the models by task_arithmetic, with each delta as "
            "a model"
        )
    elif kinds == {True}:
        found.sums[name] = adding
        if changes[0].dtype not in FLOATING:
            yield f"{name} is {changes[0].dtype}, whose entries cannot be added up"
    else:
        found.products[name] = adding


def _head(members: list[Member], named: str | None) -> Member | None:
    """Return the member whose whole tensors are taken."""
    if named is not None:
        found = [member for member in members if member.name == named]
        if not found:
            names = [member.name for member in members]
            near = nearest(named, names) or names
            raise PlanError(f"--head {named} is none of the members: {', '.join(near)}")
        if not found[0].dense:
            raise PlanError(f"--head {named} holds no tensor whole, so it has no effect")
        return found[0]
    holding = [member for member in members if member.dense]
    if len(holding) > 1:
        told = "; ".join(f"{member.name} ({listed(member.dense)})" for member in holding)
        raise SourceError(
            f"several members hold tensors whole, which are not added up: {told}; --head names "
            "the one to take them from, and a merge plan averages the models that they make "
            "(`model: BASE` with `delta: FILE`)"
        )
    return holding[0] if holding else None


def _packs(members: Iterable[Member]) -> Iterator[str]:
    for member in members:
        packed = [c.name for c in member.delta.changes.values() if c.kind == "mask"]
        if packed:
            yield (
                f"{member.name} is a pack of tasks: `mergekit-ft delta unpack` makes the delta of "
                f"one ({', '.join(member.delta.tasks)})"
            )


def _bases(name: str, holders: list[Member]) -> Iterator[str]:
    """Tell where members change different tensors of one name."""
    first = holders[0]
    for other in holders[1:]:
        one, two = first.delta.changes[name], other.delta.changes[name]
        if one.sha256 != two.sha256:
            yield (
                f"{name} is not the same tensor in the bases of {first.name} ({first.delta.base}) "
                f"and {other.name} ({other.delta.base}): SHA-256 {_short(one)} and {_short(two)}; "
                "extract both against one base"
            )
        elif one.kind != "dense" and two.kind != "dense" and _form(one) != _form(two):
            yield f"{name} has one form in {first.name} and another in {other.name}"


def _short(change: Change) -> str:
    return "of no tensor" if change.sha256 is None else f"{change.sha256[:12]}..."


def _form(change: Change) -> tuple[str, tuple[int, ...]]:
    return change.dtype, change.shape


def _digest(path: str) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(Path(path).expanduser(), "rb") as file:
        while data := file.read(READ):
            sha.update(data)
    return sha.hexdigest()
