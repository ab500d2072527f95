"""A merge that is not written: a mapping from names to tensors, or a model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.blocks import Span
from mergekit_ft.checkpoint.config import config_bytes
from mergekit_ft.engine import PlanLike, passes_for, resolve_plan
from mergekit_ft.errors import PlanError
from mergekit_ft.options import Options
from mergekit_ft.resolution import Resolution, Task
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import TORCH

GENERATION = "generation_config.json"


def open_plan(plan: PlanLike, **options: Any) -> MergedTensors:
    """Return a merge as a mapping from names to tensors, each made when it is asked for."""
    chosen = Options(**options)
    return MergedTensors(resolve_plan(plan, chosen), chosen)


def load(plan: PlanLike, *, model_class: Any = None, **options: Any) -> Any:
    """Return the merge as a transformers model, with no checkpoint on disk.

    The class is the one that the donor's config names, or `model_class`.
    """
    import transformers

    with open_plan(plan, **options) as tensors:
        donor = tensors.resolution.donor
        if not donor.config or donor.folder is None:
            raise PlanError(
                f"{donor.reference} has no config.json, so no model can be made of its tensors; "
                "open_plan gives the tensors"
            )
        folder = donor.folder
        settings = _settings(tensors.resolution, folder)
        named = (settings.architectures or [""])[0]
        chosen = model_class or getattr(transformers, named, None)
        if chosen is None:
            raise PlanError(
                f"the config of {folder} names no model class that transformers has ({named!r}); "
                "pass model_class"
            )
        state = dict(tensors.items())
        dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
        model = chosen.from_pretrained(None, config=settings, state_dict=state, dtype=dtype)
        model.generation_config = _generation(donor) or model.generation_config
        return model


def _settings(resolution: Resolution, folder: Path) -> Any:
    """Return the config that the output would have."""
    import transformers

    if not resolution.edits:
        return transformers.AutoConfig.from_pretrained(folder)
    with TemporaryDirectory() as made:
        (Path(made) / "config.json").write_bytes(config_bytes(resolution) or b"{}")
        return transformers.AutoConfig.from_pretrained(made)


def _generation(donor: Source) -> Any:
    """Return how the output generates; None where the donor does not say."""
    import transformers

    changed = donor.around.replaced.get(GENERATION)
    if isinstance(changed, bytes):
        return transformers.GenerationConfig.from_dict(json.loads(changed))
    assert donor.folder is not None
    if not (donor.folder / GENERATION).exists():
        return None
    return transformers.GenerationConfig.from_pretrained(donor.folder)


class MergedTensors(Mapping[str, Tensor]):
    """A merge that is computed tensor by tensor."""

    def __init__(self, resolution: Resolution, options: Options) -> None:
        self.resolution = resolution
        self._tasks = {task.name: task for task in resolution.tasks}
        self._passes = passes_for(resolution, options)

    def __getitem__(self, name: str) -> Tensor:
        task = self._tasks[name]
        self._passes.survey_model(lambda key, finding: finding)
        only = replace(self._passes, tasks=[task])
        sink = _IntoMemory(task)
        only.merge(sink)
        return sink.tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __enter__(self) -> MergedTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the sources."""
        self.resolution.close()


class _IntoMemory:
    """Keeps one tensor."""

    def __init__(self, task: Task) -> None:
        self.tensor = torch.empty(task.shape, dtype=TORCH[task.dtype])

    def put(self, task: Task, span: Span, out: Tensor) -> None:
        self.tensor.view(-1)[span.start : span.stop].copy_(out)

    def finish(self, task: Task, changed: bool) -> None:
        pass
