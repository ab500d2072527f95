"""Tensors of the donor that a model lacks: which may be copied, which must not be missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mergekit_ft.layers import Place
from mergekit_ft.sources import Source
from mergekit_ft.sources.ties import TEXT_CONFIGS

BUFFER = re.compile(  # constants that older checkpoints hold and newer ones do not
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias|attention\.(?:masked_)?bias"
    r"|embeddings\.position_ids)"
)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def conserved(
    donor: Source, source: Source, places: Mapping[str, Place], missing: Collection[str]
) -> set[str]:
    """Return those of the missing tensors that are the donor's alone: copied, nothing is lost.

    They are whole parts that the source has nothing of (a vision tower, a projector, layers that
    predict further tokens) and constants; never part of a stack or module that the source has, a
    head, an embedding or a norm of the model itself, nor most of the model.
    """
    if _numel(donor, missing) * 2 > _numel(donor, donor):
        return set()
    held = {prefix for name in source for prefix in _prefixes(name)}
    stacks = {places[name].stack for name in donor if source.locate(name) and _inside(places[name])}
    beyond = _layers(donor.config)
    found = set()
    for name in missing:
        place = places[name]
        if BUFFER.fullmatch(name):
            found.add(name)
        elif _inside(place):
            extra = beyond is not None and place.layer is not None and place.layer >= beyond
            if place.stack not in stacks or (extra and f"{place.stack}.{place.layer}." not in held):
                found.add(name)
        else:
            part = next((prefix for prefix in _prefixes(name) if prefix not in held), None)
            if part and (place.role == "other" or _has_layers(part, places)):
                found.add(name)
    return found


def own_heads(donor: Source, source: Source) -> list[str]:
    """Return the tensors of a source that the donor ties to another, and the source does not."""
    return [name for name in donor.ties if name in source and name not in source.ties]


def _inside(place: Place) -> bool:
    return place.layer is not None


def _prefixes(name: str) -> list[str]:
    """Return "a.", "a.b." for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]


def _has_layers(part: str, places: Mapping[str, Place]) -> bool:
    return any(name.startswith(part) and _inside(place) for name, place in places.items())


def _numel(donor: Source, names: Iterable[str]) -> int:
    return sum(donor[name].numel for name in names)


def _layers(config: Mapping[str, Any]) -> int | None:
    """Return how many layers a config declares; a checkpoint may hold more, to predict further."""
    parts = [config, *(config.get(key) for key in TEXT_CONFIGS)]
    counts = [
        part[key] for part in parts if isinstance(part, dict) for key in LAYERS if key in part
    ]
    return counts[0] if counts and isinstance(counts[0], int) else None
