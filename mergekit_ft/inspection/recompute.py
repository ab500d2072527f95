"""Tensors computed again in float64, whole, by each method's reference; no blocks, no passes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_ft.contract import About
from mergekit_ft.errors import SourceError
from mergekit_ft.plan import ModelReference, read
from mergekit_ft.plan.references import AdapterReference
from mergekit_ft.resolution import Ref, Resolution, Task
from mergekit_ft.sources.adapter import INSIDE as ADAPTER
from mergekit_ft.sources.dtypes import TORCH
from mergekit_ft.sources.patched import INSIDE as DELTA
from mergekit_ft.stages import resolve

if TYPE_CHECKING:
    from mergekit_ft.sources import Source

COPIES = 6  # float64 tensors that a reference holds besides base and tuned
RELATIVE = {32: 1e-5, 64: 1e-12}  # of the tensor's largest operand, by the bits of the arithmetic
CANCELLED = 1e-6  # the same where the stored dtype is coarser than the arithmetic
BORDERLINE = 1e-5  # share of elements where a choice (kept or not, + or -) may fall the other way


class Absent(SourceError):
    """A source that is not where the receipt says."""


@dataclass(frozen=True)
class Comparison:
    """How a stored tensor compares with the one computed again."""

    name: str
    elements: int
    differ: int  # elements beyond the tolerance
    largest: float  # absolute difference
    problem: str = ""  # where no element could be compared

    @property
    def ok(self) -> bool:
        """Say whether the tensor is what the plan makes."""
        return not self.problem and self.differ <= BORDERLINE * self.elements


def reopen(
    receipt: Mapping[str, Any], out: Path, root: Path | None, *, offline: bool
) -> Resolution:
    """Resolve a receipt's plan again, at the revisions it names; relative paths are looked for."""
    lenient = bool(receipt["options"].get("lenient"))
    reading = read(receipt["plan"].rstrip("\n") + "\n", lenient=lenient)
    reading.accepted()
    finder = _Finder(receipt, out, root)
    allow_pickle = bool(receipt["options"].get("allow_pickle"))
    return resolve(reading, find=finder.find, offline=offline, allow_pickle=allow_pickle)


class _Finder:
    """Finds the sources of a receipt where they are now."""

    def __init__(self, receipt: Mapping[str, Any], out: Path, root: Path | None) -> None:
        self._sources = receipt["sources"]
        self._homes = [root] if root is not None else [Path.cwd(), *out.resolve().parents]

    def find(self, model: ModelReference) -> ModelReference:
        """Return the reference by which a model, and what is on it, are opened again."""
        entries = [entry for entry in self._sources if entry["reference"] == _reference(model)]
        words = self._found(model.path, model.revision, [_own(entry) for entry in entries])
        if model.delta is not None:
            files = [_inside(entry, DELTA) for entry in entries]
            at = self._local(model.delta.path, [{"files": part} for part in files])
            return ModelReference(**words, delta=model.delta.model_copy(update={"path": str(at)}))
        if model.adapter is None:
            return ModelReference(**words)
        parts = [_of_adapter(entry) for entry in entries]
        adapter = self._found(model.adapter.path, model.adapter.revision, parts)
        return ModelReference(**words, adapter=AdapterReference(**adapter))

    def _found(
        self, path: str, revision: str | None, entries: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        revisions = {entry["revision"] for entry in entries} - {None}
        if revisions:
            return {"path": path, "revision": revisions.pop() if len(revisions) == 1 else revision}
        return {"path": str(self._local(path, entries)), "revision": None}

    def _local(self, path: str, entries: Sequence[Mapping[str, Any]]) -> Path:
        there = [home / path for home in self._homes if (home / path).exists()]
        if not there:
            homes = f"{self._homes[0]}" + ("" if len(self._homes) == 1 else " or above the output")
            raise Absent(
                f"{path}: not found from {homes}; --root names the folder that the plan's "
                "relative paths start from"
            )
        return next((place for place in there if _has_sizes(place, entries)), there[0])


def _reference(model: ModelReference) -> str:
    """Return how a receipt names a model with what is on it."""
    if model.delta is not None:
        of = "" if model.delta.task is None else f":{model.delta.task}"
        return f"{model.path}{'-' if model.delta.revert else '+'}{model.delta.path}{of}"
    return model.path if model.adapter is None else f"{model.path}+{model.adapter.path}"


def _own(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a receipt says of a model, without what is on it."""
    others = (f"{ADAPTER}/", f"{DELTA}/")
    files = {name: f for name, f in entry["files"].items() if not name.startswith(others)}
    return {"revision": entry["revision"], "files": files}


def _of_adapter(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a receipt says of the adapter on a model."""
    found = _inside(entry, ADAPTER)
    return {"revision": entry.get("adapter", {}).get("revision"), "files": found}


def _inside(entry: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return the files of what is on a model, by their own names."""
    inside = f"{folder}/"
    files = entry["files"].items()
    return {name.removeprefix(inside): f for name, f in files if name.startswith(inside)}


def _has_sizes(place: Path, entries: Sequence[Mapping[str, Any]]) -> bool:
    files = [item for entry in entries for item in entry["files"].items()]
    whole = place.is_file()  # a source of a single file
    paths = [(place if whole else place / name, file["size"]) for name, file in files]
    return all(path.is_file() and os.path.getsize(path) == size for path, size in paths)


def need(task: Task) -> int:
    """Return the bytes that computing a task again takes."""
    return 8 * task.numel * (COPIES + len(task.tuned))


def as_merged(resolution: Resolution, receipt: Mapping[str, Any]) -> list[Task]:
    """Return the tasks under the names that their models had when they were merged."""
    names = dict(zip(resolution.ids, receipt["ids"], strict=False))
    return [
        replace(task, ids=tuple(names.get(model, model) for model in task.ids))
        for task in resolution.tasks
    ]


def compare(task: Task, stored: Source, receipt: Mapping[str, Any]) -> Comparison:
    """Compare a tensor of the output with what the plan makes."""
    name, wanted = task.name, (task.dtype, task.shape)
    if name not in stored:
        return Comparison(name, task.numel, 0, 0.0, "is missing")
    if (found := (stored[name].dtype, stored[name].shape)) != wanted:
        return Comparison(name, task.numel, 0, 0.0, f"is {found[0]} {list(found[1])}")
    ours = stored.tensor(name)
    if task.copy is not None:
        return _compare_copy(task, ours, task.copy)
    final, scale = _expected(task, receipt)
    return _compare(task, ours, final, scale)


def _expected(task: Task, receipt: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Return the tensor in float64, and the largest magnitude that went into it."""
    operator, findings = task.operator, receipt["findings"]
    assert operator is not None
    tuned = [_read(ref) for ref in task.tuned]
    base = _read(task.base) if task.base is not None else torch.zeros_like(tuned[0])
    result = operator.reference(base, tuned, _about(task, findings.get("merge")))
    scale = max((_largest(tensor) for tensor in (base, *tuned, result)), default=0.0)
    if not task.then and (task.base is None or not operator.yields_delta):
        return result, scale
    delta = result if operator.yields_delta else result - base
    for i, adjustment in enumerate(task.then):
        delta = adjustment.reference_adjust(delta, _about(task, findings.get(f"then.{i}")))
    return base + delta, max(scale, _largest(delta))


def _about(task: Task, finding: Any) -> About:
    return replace(task.about(), finding=finding, first_cell=task.first_cell)


def _read(ref: Ref) -> Tensor:
    return ref.source.tensor(ref.name).double()


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _compare_copy(task: Task, ours: Tensor, copy: Ref) -> Comparison:
    """Compare a tensor that no operator changes: every bit counts."""
    theirs = copy.source.tensor(copy.name).to(ours.dtype)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    unequal = ours.view(width) != theirs.view(width)
    error = (ours.double() - theirs.double()).abs().nan_to_num()
    count = int(unequal.sum())
    problem = f"differs from {copy.source.reference} in {count:,} elements" if count else ""
    return Comparison(task.name, task.numel, count, _largest(error), problem)


def _compare(task: Task, ours: Tensor, final: Tensor, scale: float) -> Comparison:
    """Compare within the tolerance of the stored dtype."""
    theirs = final.to(TORCH[task.dtype])
    error = (ours.double() - final).abs()
    if ours.element_size() < 4:
        close = ((_ordinal(ours) - _ordinal(theirs)).abs() <= 1) | (error <= CANCELLED * scale)
    else:
        close = error <= RELATIVE[task.bits] * scale
    close |= (ours == theirs) | (ours.isnan() & theirs.isnan())
    return Comparison(task.name, task.numel, int((~close).sum()), _largest(error.nan_to_num()))


def _ordinal(values: Tensor) -> Tensor:
    """Return integers one apart for neighbouring floats, 0 for both zeros."""
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int8).int()
    return torch.where(bits < 0, -(bits & (0x7FFF if values.element_size() == 2 else 0x7F)), bits)
