"""A checkpoint as a model in memory, with its tokenizer: to be tuned, or to be asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.checkpoint.sides import copy_sides
from mergekit_ft.engine import PlanLike, resolve_plan
from mergekit_ft.errors import SourceError
from mergekit_ft.layers import Place, places
from mergekit_ft.merged import load
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.options import Options
from mergekit_ft.plan import ModelReference
from mergekit_ft.resolution.opening import open_reference
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import FLOATING

Words = dict[str, Any]
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # of a tokenizer


@dataclass
class Base:
    """A model that is tuned, and the checkpoint that it is of."""

    source: Source
    model: nn.Module
    tokenizer: Any
    parameters: dict[str, nn.Parameter]  # by the checkpoint's names, each once
    places: dict[str, Place]

    @property
    def padding(self) -> int:
        """Return the token that fills rows up; nothing is learned of it."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def stored_in(self) -> set[str]:
        """Return the dtypes that the checkpoint's weights have."""
        return {info.dtype for info in self.source.values() if info.dtype in FLOATING}

    def origin(self, name: str) -> Tensor:
        """Return a parameter as the checkpoint has it: host, float32."""
        return self.source.tensor(name).float()


def alone(reference: ModelReference) -> Words:
    """Return the plan that is a model as it is."""
    words = reference.model_dump(exclude_none=True)
    return {"merge_method": "passthrough", "models": [{"model": words}]}


def open_base(reference: ModelReference, *, partly: bool = False, **opening: Any) -> Base:
    """Open a model, and load it with its weights in float32.

    SourceError where transformers has a weight that the checkpoint lacks under that name or in that
    shape; `partly` leaves such weights out of its parameters.
    """
    source, tokenizer = around(reference, **opening)
    model = load(alone(reference), **opening).float()
    parameters = _named(model, source, partly)
    model.config.use_cache = False
    return Base(source, model, tokenizer, parameters, places(source))


def open_speaker(
    reference: ModelReference,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **opening: Any,
) -> ModelSpeaker:
    """Open a model to ask it for logits, its weights in `dtype`.

    SourceError where it has no config.json or no tokenizer.
    """
    _, tokenizer = around(reference, **opening)
    with quiet():
        model = load(alone(reference), **opening).to(device=device, dtype=dtype)
    return ModelSpeaker(model, tokenizer, str(reference))


def open_merge(
    plan: PlanLike,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **opening: Any,
) -> ModelSpeaker:
    """Open what a merge plan makes, to ask it for logits: merged in memory, not written."""
    tokenizer = merged_tokenizer(plan, **opening)
    with quiet():
        model = load(plan, **opening).to(device=device, dtype=dtype)
    return ModelSpeaker(model, tokenizer, str(plan))


def merged_tokenizer(plan: PlanLike, **opening: Any) -> Any:
    """Return the tokenizer that a merge would write; the plan is read and resolved for it."""
    from transformers import AutoTokenizer

    resolution = resolve_plan(plan, Options(**opening))
    with closing(resolution), TemporaryDirectory() as made:
        copy_sides(resolution, Path(made), copy_code=False)
        try:
            return AutoTokenizer.from_pretrained(made)
        except UNREADABLE as error:
            raise SourceError(f"{plan}: makes no tokenizer that transformers can read") from error


def around(reference: ModelReference, **opening: Any) -> tuple[Source, Any]:
    """Return the checkpoint that a model is of, and its tokenizer."""
    from transformers import AutoTokenizer

    source = open_reference(reference, **opening)
    if source.folder is None or not source.config:
        raise SourceError(f"{reference}: has no config.json, so there is no model to load")
    try:
        return source, AutoTokenizer.from_pretrained(source.folder)
    except UNREADABLE as error:
        raise SourceError(
            f"{reference}: has no tokenizer that transformers can read; put the tokenizer's files "
            "beside the weights"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and remarks of transformers away; what matters is said by us."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _named(model: nn.Module, source: Source, partly: bool) -> dict[str, nn.Parameter]:
    """Return the parameters by the checkpoint's names, which must be the model's, or partly."""
    found = dict(model.named_parameters())  # tied ones once
    stored = {name for name, info in source.items() if info.dtype in FLOATING}
    inside = f"{getattr(model, 'base_model_prefix', '')}."  # which a checkpoint may leave out
    renamed: dict[str, nn.Parameter] = {}
    for name, parameter in found.items():
        names = (name, source.locate(name), name.removeprefix(inside))
        here = next((n for n in names if n in stored), None)
        if here is not None and tuple(parameter.shape) == source[here].shape:
            renamed[here] = parameter
        elif not partly:
            raise SourceError(
                f"{source.reference}: transformers calls {name} what the checkpoint does not have "
                "under that name or in that shape (experts that it fuses, say), so what is "
                "trained could not be put back; tune another layout of this model"
            )
    return renamed
