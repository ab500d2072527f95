"""Where each tensor stands: its stack, its layer, its role. Known from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["block", "embedding", "norm", "head", "other"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in its model."""

    role: Role = "other"
    stack: str = ""  # the prefix before the layer number: "model.layers"
    layer: int | None = None  # 0 first, None outside every stack
    layers: int = 0  # how many the stack has

    @property
    def depth(self) -> float | None:
        """Return 0 for the first layer to 1 for the last; a stack of one layer is at 1."""
        if self.layer is None:
            return None
        return 1.0 if self.layers < 2 else self.layer / (self.layers - 1)


_LAYER = re.compile(r"(?:^|\.)([0-9]+)\.")  # the first such segment: T5's block, not its sub-layer

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")  # of an expert, or of a part of a layer

_BESIDE = re.compile(r"(?:^|[._])(?:mtp|nextn|medusa|eagle)")
_HEAD = re.compile(
    r"lm_head|embed_out|score|classifier|pre_classifier|classification_head|qa_outputs|cls"
    r"|heads?|v_head|value_head|output_layer|proj_out|predictions|final_logits_bias"
    r"|vocab_(?:transform|layer_norm|projector)"
)
_EMBEDDING = re.compile(
    r"(?:.*_)?embed(?:s|ding|dings)?(?:_.*)?|wte|wpe|shared|cls_token|mask_token|position_ids"
)
_NORM = re.compile(r"(?:.*_)?(?:(?:layer_?|layr|rms_?|batch_?)?norm|ln)(?:_.*|\d*)", re.IGNORECASE)


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of each tensor; layers are counted per stack over all the names."""
    found = {name: _stack_and_layer(name) for name in names}
    counts: dict[str, int] = {}
    for at in found.values():
        if at is not None:
            counts[at[0]] = max(counts.get(at[0], 0), at[1] + 1)
    return {
        name: Place(role_of(name)) if at is None else Place("block", *at, counts[at[0]])
        for name, at in found.items()
    }


def stacks(found: Mapping[str, Place]) -> dict[str, int]:
    """Return the stacks that a model is made of, and how many layers each has.

    Numbered parts of a head and layers that predict further tokens are no stacks of the model.
    """
    held: dict[str, set[int]] = {}
    for place in found.values():
        if place.layer is not None:
            held.setdefault(place.stack, set()).add(place.layer)
    return {
        stack: len(layers)
        for stack, layers in held.items()
        if len(layers) == max(layers) + 1 and not _BESIDE.search(stack) and role_of(stack) != "head"
    }


def renumbered(name: str, place: Place, layer: int) -> str:
    """Return the name that a tensor of a layer has in another layer."""
    before = f"{place.stack}." if place.stack else ""
    return f"{before}{layer}{name[len(before) + len(str(place.layer)) :]}"


def family(name: str, place: Place) -> str:
    """Return what a tensor is called in every layer: "self_attn.q_proj", "mlp.experts.*.w1".

    Experts count as one; ".weight" is left out. Outside every stack a tensor is its own family.
    """
    if place.layer is not None:
        before = f"{place.stack}." if place.stack else ""
        name = name[len(before) + len(str(place.layer)) + 1 :]
        name = _NUMBER.sub("*", name)
    return name.removesuffix(".weight") or name


def _stack_and_layer(name: str) -> tuple[str, int] | None:
    hit = _LAYER.search(name)
    return (name[: hit.start()], int(hit[1])) if hit else None


def role_of(name: str) -> Role:
    """Return what a tensor is by its name alone, were it outside every stack."""
    segments = name.split(".")
    if any(map(_HEAD.fullmatch, segments)) or segments[-2:-1] == ["output"]:
        return "head"  # first: lm_head.layer_norm, cls.predictions.transform.LayerNorm
    if any(map(_EMBEDDING.fullmatch, segments)):
        return "embedding"  # before norms: embeddings.LayerNorm
    return "norm" if any(map(_NORM.fullmatch, segments)) else "other"
