"""Every model that a plan names, opened once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mergekit_ft.errors import Fault, PlanError, SourceError
from mergekit_ft.plan import ModelReference, Reading, nearest_stage, referred
from mergekit_ft.plan.references import Key
from mergekit_ft.sources import Source, adapted, open_adapter, open_source
from mergekit_ft.sources.delta_file import open_delta
from mergekit_ft.sources.patched import patched

Opened = Mapping[Key, Source]
Find = Callable[[ModelReference], ModelReference]  # where a model is now
Stage = Callable[[Reading, str], Source | None]  # the source that a stage's merge is


class Opener:
    """Opens models, each once for all documents of a plan."""

    def __init__(self, find: Find | None, opening: Mapping[str, Any]) -> None:
        self.sources: dict[Key, Source] = {}
        self._find, self._opening = find, opening

    def opened(self, reading: Reading, stage: Stage) -> Opened | None:
        """Open each model of a document; a fault, and None, where one cannot be opened."""
        found: dict[Key, Source | None] = {}
        for path, model in referred(reading.plan):
            if model.key not in found:
                staged = model.path in reading.stages
                source = stage(reading, model.path) if staged else self._open(reading, path, model)
                found[model.key] = source
        return {key: source for key, source in found.items() if source} if _whole(found) else None

    def _open(self, reading: Reading, path: Any, model: ModelReference) -> Source | None:
        if model.key not in self.sources:
            at = model if self._find is None else self._find(model)
            try:
                self.sources[model.key] = self._on_its_base(model, at)
            except SourceError as error:
                reading.add(path, f"{error}{nearest_stage(reading, model)}", kind="source")
        return self.sources.get(model.key)

    def _on_its_base(self, model: ModelReference, at: ModelReference) -> Source:
        """Open a model, unless it was before, and put its adapter or its delta on it."""
        bare = model.bare.key
        if bare not in self.sources:
            self.sources[bare] = open_source(at.path, at.revision, **self._opening)
        if at.delta is not None:
            delta = open_delta(Path(at.delta.path), at.delta.path)
            words = at.delta.model_dump(include={"scale", "revert", "task"})
            return patched(self.sources[bare], delta, **words)
        if at.adapter is None:
            return self.sources[bare]
        given = {key: value for key, value in self._opening.items() if key != "headers_only"}
        adapter = open_adapter(at.adapter.path, at.adapter.revision, **given)
        return adapted(self.sources[bare], adapter)


def reference_of(words: str) -> ModelReference:
    """Read a model by a plan's words: PATH, PATH@REVISION, MODEL+ADAPTER, {model: M, delta: D}.

    In braces stands what a plan has there, in YAML.
    """
    try:
        raw = yaml.safe_load(words) if words.startswith("{") else words
        return ModelReference.model_validate(raw)
    except yaml.YAMLError:
        raise PlanError(f"{words}: is not YAML; write {{model: PATH, delta: FILE}}") from None
    except ValidationError as error:
        raise PlanError(f"{words}: {error.errors()[0]['msg']}") from None


def open_model(words: str, **opening: Any) -> Source:
    """Open a model by the words of `reference_of`. `opening` is as for a source."""
    return open_reference(reference_of(words), **opening)


def open_reference(reference: ModelReference, **opening: Any) -> Source:
    """Open a model with what is put on it."""
    return Opener(None, opening)._on_its_base(reference, reference)


def _whole(found: Mapping[Key, Source | None]) -> bool:
    return bool(found) and all(source is not None for source in found.values())


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise all faults as one error: of the sources where only they are at fault."""
    if faults:
        report = PlanError(faults)
        if all(fault.kind == "source" for fault in faults):
            raise SourceError(str(report))
        raise report
