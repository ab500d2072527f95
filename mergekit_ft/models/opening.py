"""The base of a tuning: its source, its model in memory, its tokenizer; names that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import Place, places
from mergekit_ft.merged import load
from mergekit_ft.plan import ModelReference, read
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.stages import resolve

Words = dict[str, Any]


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


def open_base(reference: ModelReference, **opening: Any) -> Base:
    """Open a model, and load it with its weights in float32."""
    from transformers import AutoTokenizer

    resolution = resolve(read(alone(reference)), **opening)
    source = resolution.donor
    if source.folder is None or not source.config:
        raise SourceError(f"{reference}: has no config.json, so there is no model to load")
    model = load(alone(reference), **opening).float()
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    parameters = _named(model, source)
    model.config.use_cache = False
    return Base(source, model, tokenizer, parameters, places(source))


def _named(model: nn.Module, source: Source) -> dict[str, nn.Parameter]:
    """Return the parameters by the checkpoint's names, which must be the model's."""
    found = dict(model.named_parameters())  # tied ones once
    stored = {name for name, info in source.items() if info.dtype in FLOATING}
    renamed: dict[str, nn.Parameter] = {}
    for name, parameter in found.items():
        here = name if name in stored else source.locate(name)
        if here is None or tuple(parameter.shape) != source[here].shape:
            raise SourceError(
                f"{source.reference}: transformers calls {name} what the checkpoint does not have "
                "under that name or in that shape (experts that it fuses, say), so what is "
                "trained could not be put back; tune another layout of this model"
            )
        renamed[here] = parameter
    return renamed
