"""Runs a probe: every tensor of its models, one after the other, past it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from mergekit_ft import registry
from mergekit_ft.contract import CELL
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.inspection.tables import size
from mergekit_ft.layers import Place, places
from mergekit_ft.looking import Finding, Probe, Seen
from mergekit_ft.options import Progress, Unwatched
from mergekit_ft.plan.fields import listed as parameters_listed
from mergekit_ft.plan.fields import parameters_of
from mergekit_ft.registry import did_you_mean
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.adapted import CONV1D, CONV1D_MODULES
from mergekit_ft.sources.dtypes import FLOATING, SIZE, TORCH
from mergekit_ft.sources.layout import listed

WHOLE = 6  # float64 copies of a tensor that a probe of whole tensors takes, about


@dataclass(frozen=True)
class Probed:
    """What a probe found."""

    name: str
    models: tuple[str, ...]
    parameters: Mapping[str, Any]
    findings: list[tuple[Seen, Finding]]
    conclusion: Mapping[str, Any]
    modules: list[str]  # that the findings name
    left: int  # tensors that were not looked at
    columns: tuple[str, ...]
    unit: str

    def report(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        return {
            "probe": self.name,
            "models": list(self.models),
            "parameters": dict(self.parameters),
            **self.conclusion,
            "modules": self.modules,
            "tensors": [{"name": seen.name, **finding} for seen, finding in self.findings],
        }


def read_plan(path: str | os.PathLike[str]) -> tuple[str, list[str], dict[str, Any]]:
    """Return the probe, the models and the parameters that a YAML file names."""
    try:
        words = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None
    known = {"probe", "models", "parameters"}
    if not isinstance(words, dict) or not {"probe", "models"} <= words.keys() <= known:
        raise PlanError(f"{path}: a probe's plan has `probe:`, `models:` and perhaps `parameters:`")
    return str(words["probe"]), [str(m) for m in words["models"]], words.get("parameters") or {}


def probe(
    name: str,
    models: Sequence[str],
    parameters: Mapping[str, Any] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    memory: int = 2**30,
    offline: bool = False,
    progress: Progress | None = None,
) -> Probed:
    """Look at models with a probe, tensor by tensor, within so many bytes."""
    method = _made(name, parameters or {})
    _require_models(name, method, models)
    watcher = progress or Unwatched()
    sources = [open_source(model, offline=offline) for model in models]
    try:
        names = list(_names(method, sources, include, exclude))
        found = _Probing(method, sources, memory, watcher).over(names)
    finally:
        watcher.close()
        for source in sources:
            source.close()
    return Probed(
        name,
        tuple(models),
        method.model_dump(by_alias=True),
        found,
        method.conclude(found),
        method.listed(found),
        len(sources[0]) - len(names),
        method.columns,
        method.unit,
    )


def _made(name: str, given: Mapping[str, Any]) -> Probe:
    """Return a probe with its parameters, or say all that is wrong with them."""
    kind = registry.of_kind(name, "probe")
    known, values, faults = parameters_of(kind), {}, []
    for word, raw in given.items():
        if word not in known:
            hint = did_you_mean(word, known)
            faults.append(
                f"{name}: unknown parameter '{word}'{hint} {parameters_listed(kind, name)}"
            )
            continue
        try:
            values[word] = known[word].value(raw)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise PlanError("\n".join(faults))
    try:
        made: Probe = kind(**values)
    except ValidationError as error:
        raise PlanError(f"{name}: {error.errors()[0]['msg']}") from None
    return made


def _require_models(name: str, method: Probe, models: Sequence[str]) -> None:
    least, most = method.takes
    if len(models) < least or (most is not None and len(models) > most):
        wanted = f"{least}" if most == least else f"at least {least}"
        raise PlanError(f"{name} looks at {wanted} models, the base first; {len(models)} are named")


def _names(
    method: Probe, sources: Sequence[Source], include: Sequence[str], exclude: Sequence[str]
) -> Iterator[str]:
    """Yield the tensors to look at, which every model must have in one shape."""
    base = sources[0]
    for option, globs in (("--include", include), ("--exclude", exclude)):
        idle = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in base)]
        if idle:
            raise PlanError(f"{option} {idle[0]}: matches no tensor of {base.reference}")
    seats, faults, found = places(base), [], []
    for name, info in base.items():
        chosen = not include or any(fnmatchcase(name, glob) for glob in include)
        chosen = chosen and not any(fnmatchcase(name, glob) for glob in exclude)
        tied = base.ties.get(name) in base
        if tied or not chosen or info.dtype not in FLOATING:
            continue
        if not method.wants(name, seats[name], info.shape):
            continue
        found.append(name)
        for other in sources[1:]:
            held = other.locate(name)
            if held is None or other[held].shape != info.shape:
                shape = "no such tensor" if held is None else f"shape {list(other[held].shape)}"
                faults.append(f"{other.reference}: {name}: {shape}, {list(info.shape)} in the base")
    if faults:
        raise SourceError("\n".join(faults[:10]) + "\nthe models of a probe are of one shape")
    if not found:
        raise SourceError(
            f"{base.reference}: has no tensor that this probe looks at: {listed(list(base))}"
        )
    yield from found


class _Probing:
    """One probe under way."""

    def __init__(
        self, method: Probe, sources: Sequence[Source], memory: int, watcher: Progress
    ) -> None:
        self.method, self.sources, self.memory, self.watcher = method, sources, memory, watcher
        self.seats = places(sources[0])

    def over(self, names: Sequence[str]) -> list[tuple[Seen, Finding]]:
        base = self.sources[0]
        if self.method.sees_whole:
            self._require_room(names)
        total = sum(base[name].nbytes for name in names) * len(self.sources)
        self.watcher.start(total, f"looking at {len(names)} tensors")
        found = []
        for name in names:
            seen = self._seen(name, self.seats[name])
            found.append((_light(seen), self.method.look(seen)))
            self.watcher.advance(base[name].nbytes * len(self.sources))
        return found

    def _require_room(self, names: Sequence[str]) -> None:
        largest = max(names, key=lambda name: self.sources[0][name].numel)
        need = WHOLE * 8 * self.sources[0][largest].numel
        if need > self.memory:
            raise OperatorError(
                f"{largest} must be seen whole, which takes about {size(need)}; give --memory "
                f"{size(need)}, or --exclude it"
            )

    def _seen(self, name: str, place: Place) -> Seen:
        info = self.sources[0][name]
        known = (name, place, info.shape, self._transposed(name))
        if self.method.sees_whole:
            whole = tuple(self._whole(source, name) for source in self.sources)
            return Seen(*known, whole=whole)
        return Seen(*known, sums=self._sums(name))

    def _transposed(self, name: str) -> bool:
        module = name.rpartition(".")[0].rpartition(".")[2]
        return self.sources[0].config.get("model_type") in CONV1D and module in CONV1D_MODULES

    def _whole(self, source: Source, name: str) -> Tensor:
        held = source.locate(name) or name
        values = source.tensor(held).double()
        self._require_finite(source, name, values)
        return values

    def _sums(self, name: str) -> tuple[float, ...]:
        """Return the sums over a tensor: those of its cells, added exactly."""
        numel, rows = self.sources[0][name].numel, []
        for start in range(0, numel, CELL):
            count = min(CELL, numel - start)
            cell = torch.stack([self._run(source, name, start, count) for source in self.sources])
            rows.append(self.method.reduce(cell).tolist())
        if not rows:
            return tuple(self.method.reduce(torch.zeros(len(self.sources), 1).double()).tolist())
        return tuple(math.fsum(column) for column in zip(*rows, strict=True))

    def _run(self, source: Source, name: str, start: int, count: int) -> Tensor:
        held = source.locate(name) or name
        width = SIZE[source[held].dtype]
        data = bytearray(count * width)
        source.read_into(held, start * width, memoryview(data))
        values = torch.frombuffer(data, dtype=TORCH[source[held].dtype]).double()
        self._require_finite(source, name, values)
        return values

    def _require_finite(self, source: Source, name: str, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise OperatorError(
                f"{source.reference}: {name} holds NaN or Inf; repair the file, or --exclude it"
            )


def _light(seen: Seen) -> Seen:
    """Return what was seen without the weights."""
    return Seen(seen.name, seen.place, seen.shape, seen.transposed, sums=seen.sums)
