"""Core Space (Panariello et al. 2025, arXiv:2509.17786): any operator, on small matrices.

For adapters B_t A_t of one module, t = 1..T, the scale folded into B_t:

    U    orthonormal basis of [B_1 .. B_T], its left singular vectors    (out, u), u <= sum of ranks
    V    orthonormal basis of [A_1; ..; A_T], its right singular vectors  (v, in) as rows
    M_t  = U^T B_t A_t V^T, the whole of adapter t: U M_t V = B_t A_t
    M    = the operator on M_1 .. M_T over a base of zero, M_t = 0 where t lacks the module
    out  U M V, of rank <= min(u, v)

KnOTS (Stoica et al. 2024, arXiv:2410.19735) turns the left side alone:

    U    left singular vectors of [d_1 .. d_T], d_t = B_t A_t            (out, u)
    M_t  = U^T d_t, its share of the singular values times the right vectors   (u, in)
    out  U M, of rank <= u

M is computed in float64, by the same passes as any merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ft import registry
from mergekit_ft.blocks import Span, view_of
from mergekit_ft.contract import Base
from mergekit_ft.engine import passes_for
from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.lora.members import Members
from mergekit_ft.options import Options
from mergekit_ft.plan import referred
from mergekit_ft.plan.reader import read
from mergekit_ft.resolution import Task, raise_faults
from mergekit_ft.resolution.resolver import Resolver
from mergekit_ft.sources import Source, SourceFile, TensorInfo
from mergekit_ft.sources.source import Around

Space = Literal["core", "knots"]
ZERO = "zero"  # what the base is called, in a plan and in errors
LEAST = 1e-10  # share of the largest singular value below which a direction is rounding


Basis = tuple[Tensor, Tensor | None]  # (out, u), and (v, in) where the right side is turned too


def bases(held: Members, module: str, space: Space) -> Basis:
    """Return orthonormal bases that span what every adapter writes, and what it reads."""
    found = [factors for member in held if (factors := member.factors(module)) is not None]
    lefts, rights = zip(*found, strict=True)
    left = _left_basis(torch.cat(lefts, dim=1))
    if space == "core":
        return left, _left_basis(torch.cat(rights).T).T
    shares = [(left.T @ b) @ a for b, a in found]  # of the deltas, so small that they fit
    return left @ _left_basis(torch.cat(shares, dim=1)), None


def core(basis: Basis, shape: tuple[int, int], factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return (u, v) or (u, in): the whole of an adapter's delta of shape (out, in) in the bases."""
    left, right = basis
    if factors is None:
        wide = shape[1] if right is None else right.shape[0]
        return torch.zeros(left.shape[1], wide, dtype=torch.float64)
    back = factors[1] if right is None else factors[1] @ right.T
    return (left.T @ factors[0]) @ back


def product(basis: Basis, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Return two factors of the delta that a merged core stands for."""
    left, right = basis
    return (left, merged) if right is None else (left @ merged, right)


def merged_cores(
    held: Members,
    space: Space,
    words: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    memory: int,
) -> dict[str, Tensor]:
    """Return (u, v) of every module, merged by the operator that a plan's words name.

    `own` are the parameters of each adapter, as those of a plan's models.
    """
    reading = read(_plan(held, words, own))
    raise_faults(reading.faults)
    _require_room(held, space, memory)
    cores: dict[str, list[Tensor]] = {}  # by module, one of each adapter
    for module, shape in held.shapes.items():
        basis = bases(held, module, space)
        cores[module] = [core(basis, shape, member.factors(module)) for member in held]
    models = [model for _, model in referred(reading.plan)]  # the base first, if there is one
    zero = [{module: torch.zeros_like(found[0]) for module, found in cores.items()}]
    tensors = [{module: found[i] for module, found in cores.items()} for i in range(len(held))]
    tensors = zero[: len(models) - len(held)] + tensors
    opened = {m.key: _in_memory(str(m), of) for m, of in zip(models, tensors, strict=True)}
    resolution = Resolver(reading, opened).resolution()
    raise_faults(reading.faults)
    passes = passes_for(resolution, Options(memory=memory, threads=1))
    passes.survey_model(lambda key, finding: finding)
    sink = _Kept()
    passes.merge(sink)
    return {module: sink.tensors[f"{module}.weight"] for module in held.shapes}


def require_operator(name: str | None) -> None:
    """Refuse a merge that names no operator, or one that nobody knows."""
    if name is None:
        known = ", ".join(registry.names())
        raise PlanError(f"merging in a space needs an --operator: one of {known}")
    registry.method(name)


def needs_weight(name: str) -> bool:
    """Say whether an operator wants a weight of each model."""
    weight = registry.method(name).model_fields.get("weight")
    return weight is not None and weight.is_required()


def _plan(
    held: Members, words: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a plan over the adapters as models, on a base of zero where the method takes one."""
    entries = [
        {"model": {"path": str(member)}, "parameters": dict(parameters)}
        for member, parameters in zip(held, own, strict=True)
    ]
    apart = registry.method(str(words["merge_method"])).base is not Base.IGNORED
    return {**words, **({"base_model": {"path": ZERO}} if apart else {}), "models": entries}


def _require_room(held: Members, space: Space, memory: int) -> None:
    """Refuse cores that do not fit, before they are made."""
    ranks = {module: held.ranks(module) for module in held.shapes}
    elements = sum(
        rank * (rank if space == "core" else held.shapes[module][1])
        for module, rank in ranks.items()
    )
    need = 8 * (len(held) + 2) * elements
    if need > memory // 2:
        raise OperatorError(
            f"the matrices that {len(held)} adapters become take {need:,} bytes, more than half of "
            f"the {memory:,} given; raise --memory, or merge fewer adapters at once"
        )


def _left_basis(columns: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix that carry more than rounding."""
    basis, turn = torch.linalg.qr(columns)
    vectors, values, _ = torch.linalg.svd(turn, full_matrices=False)
    count = int((values > LEAST * values[0]).sum())
    found: Tensor = basis @ vectors[:, : max(count, 1)]
    return found


class _Memory:
    """Reads tensors that are held in memory."""

    overhead = 0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {f"{name}.weight": held.contiguous() for name, held in tensors.items()}

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from `start` on."""
        into[:] = view_of(self._tensors[info.name])[start : start + len(into)]

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Do nothing: it is here."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _in_memory(name: str, tensors: Mapping[str, Tensor]) -> Source:
    """Return a source of float64 tensors."""
    file = "core.safetensors"
    infos = tuple(
        TensorInfo(f"{module}.weight", "F64", tuple(tensor.shape), file, 0, tensor.nbytes)
        for module, tensor in tensors.items()
    )
    held = SourceFile(file, Path(file), 0, {}, infos)
    return Source(name, (held,), _Memory(tensors), Around(), inputs={})


class _Kept:
    """Keeps merged tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def put(self, task: Task, span: Span, out: Tensor) -> None:
        into = self.tensors.setdefault(task.name, torch.empty(task.shape, dtype=torch.float64))
        into.view(-1)[span.start : span.stop].copy_(out)

    def finish(self, task: Task, changed: bool) -> None:
        pass
