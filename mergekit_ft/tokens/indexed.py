"""Which tensors have a row for each token: by the words of their names, and by their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.plan import Plan
from mergekit_ft.plan.tokenizers import vocabulary_words
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.sources.ties import TEXT_CONFIGS

_WORDS = re.compile(  # modules with a row for each token
    r"(?:.*_)?embed_tokens(?:_per_layer)?|tok_embeddings|wte|shared|embed_in|embed_out|embeddings?"
    r"|(?:word|token|tokens|input|text)_embeddings?|tokens_embed|w|(?:generator_)?lm_head|head"
    r"|output|output_layer|output_projection|proj_out|predictions|decoder|final_logits_bias"
    r"|vocab_projector"
)
_OTHERS = re.compile(  # modules near them that have none
    r".*(?:position|pos_|_pos|token_type|segment|patch|layer_?norm|transform(?!er)|dense|rotary"
    r"|class_embed|time_|image|vision|visual|audio).*|.*norm|ln\w*|wpe",
    re.IGNORECASE,
)
_LAYERED = re.compile(r".*per_layer.*")  # a row for each token, of a vocabulary that may be another


def may_be_indexed(name: str) -> bool:
    """Say whether a name is one of an embedding, a head, or a head's bias."""
    segments = name.split(".")
    parts = segments if len(segments) == 1 else segments[:-1]
    if segments[-1] not in ("weight", "bias") and len(segments) > 1:
        parts = segments
    leaf = parts[-1]
    near = any(map(_OTHERS.fullmatch, parts))
    return not near and _WORDS.fullmatch(leaf) is not None


def row_remedy(plan: Plan, one: TensorInfo, other: TensorInfo) -> str | None:
    """Return what would make tensors fit that differ in rows for tokens; "" where nothing would.

    None says that the plan asks for it, and that it has been told why it could not be done.
    """
    if not may_be_indexed(one.name) or not _differ_in_rows(one.shape, other.shape):
        return ""
    if vocabulary_words(plan)[0] is not None:
        return None
    return "; `tokenizer: {source: union}` (or base, or a model) aligns their rows by token"


def rows_of(source: Source) -> int:
    """Return how many rows a model has for tokens; SourceError where that cannot be told."""
    found = {info.name: info.shape[0] for info in _embeddings(source)}
    sizes = set(found.values())
    stated = {size for _, size in stated_sizes(source.config)} & sizes
    if len(stated) == 1:
        return stated.pop()
    if len(sizes) == 1:
        return sizes.pop()
    told = ", ".join(f"{name} {rows}" for name, rows in found.items()) or "none is known by name"
    raise SourceError(
        f"{source.reference}: cannot tell which tensor has a row for each token ({told}); its "
        "config.json must state `vocab_size`"
    )


def stated_sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield each `vocab_size` of a config, by dotted key."""
    parts = [("", config)]
    parts += [(f"{key}.", config[key]) for key in TEXT_CONFIGS if isinstance(config.get(key), dict)]
    for prefix, part in parts:
        if isinstance(part.get("vocab_size"), int):
            yield f"{prefix}vocab_size", part["vocab_size"]


def indexed(source: Source, rows: int) -> dict[str, TensorInfo]:
    """Return the tensors with a row for each token; SourceError for one that is not clear."""
    found = {}
    for info in source.values():
        if info.dtype in FLOATING and info.shape and may_be_indexed(info.name):
            if _row_axis(info.shape, rows) is not None:
                found[info.name] = info
            elif _LAYERED.fullmatch(info.name) or rows in info.shape:
                _refuse(source, info, rows)
    return found


def resized(info: TensorInfo, old: int, rows: int) -> tuple[int, ...]:
    """Return the shape with another number of rows."""
    axis = _row_axis(info.shape, old)
    assert axis is not None
    return (*info.shape[:axis], rows, *info.shape[axis + 1 :])


def _row_axis(shape: tuple[int, ...], rows: int) -> int | None:
    """Return the axis of the rows, where they lie one after another: none before it but ones."""
    for axis, length in enumerate(shape):
        if length == rows:
            return axis
        if length != 1:
            return None
    return None


def _differ_in_rows(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Say whether two shapes differ in nothing but an axis that has only ones before it."""
    apart = [axis for axis, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1]
    return len(one) == len(other) and len(apart) == 1 and set(one[: apart[0]]) <= {1}


def _embeddings(source: Source) -> Iterator[TensorInfo]:
    """Yield the input embeddings: matrices by their names, heads only where there are none."""
    matrices = [
        info
        for info in source.values()
        if len(info.shape) == 2 and info.dtype in FLOATING and may_be_indexed(info.name)
    ]
    inputs = [info for info in matrices if _is_input(info.name)]
    yield from (info for info in inputs or matrices if not _LAYERED.fullmatch(info.name))


def _is_input(name: str) -> bool:
    return re.search(r"embed|wte|shared|(^|\.)w\.", name) is not None and "embed_out" not in name


def _refuse(source: Source, info: TensorInfo, rows: int) -> None:
    raise SourceError(
        f"{source.reference}: {info.name} of shape {list(info.shape)} may hold rows for tokens, "
        f"but not as its embedding of {rows} rows does, so it cannot be aligned by token: leave "
        "`tokenizer:` out, or give all models one vocabulary first"
    )
