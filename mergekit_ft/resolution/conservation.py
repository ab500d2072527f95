"""Tensors of the donor that a model lacks: which may be copied, which must not be missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mergekit_ft.layers import Place
from mergekit_ft.layers import places as places_of
from mergekit_ft.sources import Source
from mergekit_ft.sources.ties import TEXT_CONFIGS

BUFFER = re.compile(  # constants that older checkpoints hold and newer ones do not
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias|attention\.(?:masked_)?bias"
    r"|embeddings\.position_ids)"
)
WORDS = re.compile(  # the embedding of tokens
    r"(?:[a-z_]+\.)*(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight"
)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def conserved(
    donor: Source, source: Source, places: Mapping[str, Place], missing: Collection[str]
) -> set[str]:
    """Return those of the missing tensors that are the donor's alone: copied, nothing is lost.

    They are whole parts that the source has nothing of (a vision tower, a projector, layers that
    predict further tokens) and constants; never part of a stack or module that the source has, nor
    a head, an embedding or a norm of the model itself. A source that has no stack of the donor's,
    or not its words, is no model of its kind.
    """
    held = {prefix for name in source for prefix in _prefixes(name)}
    shared = [name for name in donor if source.locate(name)]
    stacks = {places[name].stack for name in shared if _inside(places[name])}
    if not stacks or (any(map(_is_of_words, donor)) and not any(map(_is_of_words, shared))):
        return set()
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
            part = next((prefix for prefix in _prefixes(name) if prefix not in held), name)
            if _is_apart(part) or _has_layers(part, places):
                found.add(name)
    return found


def deeper(donor: Source, source: Source, places: Mapping[str, Place]) -> str | None:
    """Say which stack of a source has layers that the donor's lacks; not those beyond its config.

    Such a merge would leave off the end of a model.
    """
    declared = _layers(source.config)
    mine, theirs = (
        {at.stack: at.layers for at in held.values()} for held in (places_of(source), places)
    )
    for stack in sorted(mine.keys() & theirs.keys() - {""}):
        count = mine[stack] if declared is None else min(mine[stack], declared)
        if count > theirs[stack]:
            return f"{count} layers in {stack}, {theirs[stack]} in {donor.reference}"
    return None


def own_heads(donor: Source, source: Source) -> list[str]:
    """Return the tensors of a source that the donor ties to another, and the source does not."""
    return [name for name in donor.ties if name in source and name not in source.ties]


def _is_apart(part: str) -> bool:
    """Say whether a module, or a tensor that is no weight of one, is no head, embedding or norm."""
    if part.endswith((".weight", ".bias")):
        return False  # of a module that the source has
    at = f"{part}weight" if part.endswith(".") else part
    return places_of([at])[at].role == "other"


def _is_of_words(name: str) -> bool:
    return WORDS.fullmatch(name) is not None


def _inside(place: Place) -> bool:
    return place.layer is not None


def _prefixes(name: str) -> list[str]:
    """Return "a.", "a.b." for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]


def _has_layers(part: str, places: Mapping[str, Place]) -> bool:
    return any(name.startswith(part) and _inside(place) for name, place in places.items())


def _layers(config: Mapping[str, Any]) -> int | None:
    """Return how many layers a config declares; a checkpoint may hold more, to predict further."""
    parts = [config, *(config.get(key) for key in TEXT_CONFIGS)]
    counts = [
        part[key] for part in parts if isinstance(part, dict) for key in LAYERS if key in part
    ]
    return counts[0] if counts and isinstance(counts[0], int) else None
