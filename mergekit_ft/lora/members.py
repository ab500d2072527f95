"""Adapters that are merged: one delta, scale * B @ A, for each module that any of them changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.lora.words import by_number
from mergekit_ft.sources import Adapter, TensorInfo
from mergekit_ft.sources.adapter import Factors
from mergekit_ft.sources.adapter_config import NAME
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.sources.layout import listed, read_json
from mergekit_ft.sources.low_rank import Stored

WAY_OUT = "merge the models instead, each written BASE+ADAPTER in a plan"


@dataclass(frozen=True)
class Member:
    """An adapter and the factor of its delta."""

    adapter: Adapter
    weight: float

    def __str__(self) -> str:
        return self.adapter.reference

    @cached_property
    def words(self) -> Mapping[str, Any]:
        """Return all that its adapter_config.json says."""
        path = self.adapter.folder / NAME
        return read_json(path.read_bytes(), str(path))

    def factors(self, module: str) -> tuple[Tensor, Tensor] | None:
        """Return (out, r) with the scale in it and (r, in) in float64; None without the module."""
        held = self.adapter.factors.get(module)
        if held is None:
            return None
        assert held.a is not None and held.b is not None
        left, right = (self._read(info).double() for info in (held.b, held.a))
        return left.mul_(self.adapter.config.scale_of(module)), right

    def _read(self, info: TensorInfo) -> Tensor:
        values = Stored(self.adapter.reader, info).whole()
        odd = values.double().isfinite().logical_not()
        if bool(odd.any()):
            at = int(odd.flatten().nonzero()[0])
            raise OperatorError(
                f"{self}: {info.name} holds {float(values.flatten()[at])} at element {at}; train "
                "or save the adapter again"
            )
        return values


class Members(Sequence[Member]):
    """All of them, checked from headers alone."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)
        for member in self._members:
            _require_linear(member)
        self.shapes = self._shapes()
        self._require_one_naming()

    def __getitem__(self, index: Any) -> Any:
        return self._members[index]

    def __len__(self) -> int:
        return len(self._members)

    def holding(self, module: str) -> list[tuple[Member, Factors]]:
        """Return those that change a module, with what they hold of it."""
        held = ((member, member.adapter.factors.get(module)) for member in self._members)
        return [(member, factors) for member, factors in held if factors is not None]

    def is_table(self, module: str) -> bool:
        """Say whether a module is an embedding."""
        return self.holding(module)[0][1].table

    def stacked(self, module: str) -> tuple[Tensor, Tensor]:
        """Return (out, R) and (R, in) whose product is the weighted sum of all deltas."""
        lefts, rights = [], []
        for member in self._members:
            found = member.factors(module)
            if found is not None and member.weight != 0.0:
                lefts.append(found[0].mul_(member.weight))
                rights.append(found[1])
        if lefts:
            return torch.cat(lefts, dim=1), torch.cat(rights)
        out, inputs = self.shapes[module]
        zeros = torch.zeros(out + inputs, 0, dtype=torch.float64)
        return zeros[:out], zeros[out:].T

    def ranks(self, module: str) -> int:
        """Return the ranks of a module, added up."""
        return sum(factors.a.shape[0] for _, factors in self.holding(module) if factors.a)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of every module; refuse two that differ."""
        found: dict[str, tuple[int, int]] = {}
        modules = {module for member in self._members for module in member.adapter.factors}
        for module in sorted(modules, key=by_number):
            seen = {
                (f.b.shape[0], f.a.shape[1], f.table): member
                for member, f in self.holding(module)
                if f.a is not None and f.b is not None
            }
            if len(seen) > 1:
                (one, mine), (other, theirs) = list(seen.items())[:2]
                raise SourceError(
                    f"{module} goes from {one[1]} to {one[0]} in {mine}, and from {other[1]} to "
                    f"{other[0]} in {theirs}: the adapters are not of one base model"
                )
            out, inputs, _ = next(iter(seen))
            found[module] = (out, inputs)
        return found

    def _require_one_naming(self) -> None:
        """Refuse one module under two names, as wrapped models have: they would not be added."""
        ends = {module.rpartition(".")[2] for module in self.shapes}
        names = [set(member.adapter.factors) for member in self._members]
        for one in names:
            for other in names:
                alone = {m for m in other - one if "." in m and m.rpartition(".")[2] in ends}
                for module in one - other:
                    twin = next((m for m in alone if m.endswith(f".{module}")), None)
                    if twin is not None:
                        raise SourceError(
                            f"{module} and {twin} look like one module under two names: save both "
                            "adapters from the same class of model"
                        )


def members(adapters: Sequence[Adapter], weights: Sequence[float]) -> Members:
    """Return the members; one weight is for all, none is 1."""
    given = list(weights) or [1.0]
    if len(given) == 1:
        given *= len(adapters)
    if len(given) != len(adapters):
        raise PlanError(
            f"{len(given)} weights for {len(adapters)} adapters: give --weight once for all, or "
            "once for each in their order"
        )
    odd = [weight for weight in given if not math.isfinite(weight)]
    if odd:
        raise PlanError(f"--weight {odd[0]} is no number that a delta can be multiplied with")
    if len({str(adapter.folder.resolve()) for adapter in adapters}) < len(adapters):
        raise PlanError("an adapter is named twice: name it once, with the weights added up")
    return Members([Member(*pair) for pair in zip(adapters, given, strict=True)])


def notes(held: Members) -> Iterator[str]:
    """Say what the adapters do not share."""
    bases = {str(m): m.adapter.config.base for m in held if m.adapter.config.base}
    if len(set(bases.values())) > 1:
        said = ", ".join(f"{name} on {base}" for name, base in bases.items())
        yield f"by their configs the adapters were trained on different models: {said}"
    for member in held:
        lacks = [module for module in held.shapes if module not in member.adapter.factors]
        if lacks:
            yield f"{member} does not change {listed(lacks)}; it counts as zero there"


def _require_linear(member: Member) -> None:
    """Refuse what is no product of low rank alone."""
    config = member.adapter.config
    if config.dora:
        raise SourceError(
            f"{member}: is DoRA (use_dora), whose change of a weight is no product of low rank and "
            f"does not add up with others: {WAY_OUT}"
        )
    if config.biased:
        raise SourceError(
            f"{member}: adds biases to its layers (lora_bias), which peft could not load beside "
            f"adapters without: {WAY_OUT}"
        )
    if not member.adapter.factors:
        raise SourceError(f"{member}: has no factors, only whole tensors: {WAY_OUT}")
    for info in member.adapter.tensors.values():
        if info.dtype not in FLOATING:
            raise SourceError(f"{member}: {info.name} is {info.dtype}, which is no weight")
