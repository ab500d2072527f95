"""What the inputs of a merge disagree on besides their weights: a note, or an error if strict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ft.checkpoint import config
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.ties import TEXT_CONFIGS

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution
    from mergekit_ft.sources import Source

BY_LAYER = {  # what a stack says anew, wherever its layers come from
    *("num_hidden_layers", "n_layer", "num_layers", "max_window_layers"),
    *("layer_types", "no_rope_layers"),
}
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the second wins, as when loaded


def conflicts(resolution: Resolution) -> list[str]:
    """Return every disagreement that changes what the merged weights mean, those of stages too."""
    return [
        f"{name}: {line}" if name else line
        for name, part in resolution.parts.items()
        for line in _within(part)
    ]


def _within(resolution: Resolution) -> list[str]:
    donor = resolution.donor
    others = [source for source in resolution.sources if source is not donor]
    besides = BY_LAYER if resolution.stack is not None else ()
    found = [line for other in others for line in config.differences(donor, other, besides)]
    found += [line for other in others for line in _special_tokens(donor, other)]
    found += [line for other in others for line in other.around.conflicts]
    return [*found, *_beyond_the_vocabulary(donor)]


def require_none(resolution: Resolution) -> None:
    """Raise all conflicts, and tensors of a model that nothing uses, as one error."""
    unused = [
        f"{reference}: not used: {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for part in resolution.parts.values()
        for reference, names in part.unused.items()
    ]
    found = [*conflicts(resolution), *unused]
    if found:
        lines = [f"strict: {line}" for line in found]
        raise SourceError("\n".join([*lines, "make the inputs agree, or leave out --strict"]))


def _special_tokens(donor: Source, other: Source) -> Iterator[str]:
    mine, theirs = _tokens(donor), _tokens(other)
    for word in SPECIAL:
        if mine.get(word) and theirs.get(word) and mine[word] != theirs[word]:
            yield (
                f"{word}: {json.dumps(mine[word], ensure_ascii=False)} in {donor.reference}, "
                f"{json.dumps(theirs[word], ensure_ascii=False)} in {other.reference}"
            )


def _tokens(source: Source) -> dict[str, str]:
    """Return the special tokens that a model's tokenizer names."""
    found: dict[str, str] = {}
    for file in FILES:
        for word, value in _json(source, file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if word in SPECIAL and isinstance(text, str):
                found[word] = text
    return found


def _beyond_the_vocabulary(donor: Source) -> Iterator[str]:
    """Yield the tokens that end a text, as the donor says, that its vocabulary does not hold."""
    size = _vocabulary(donor)
    ends = _json(donor, "generation_config.json").get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if size is not None and isinstance(end, int) and not 0 <= end < size:
            yield (
                f"eos_token_id: {end} in generation_config.json of {donor.reference}, whose "
                f"vocabulary has {size} tokens: no text would end"
            )


def _vocabulary(source: Source) -> int | None:
    parts = [source.config, *(source.config.get(key) for key in TEXT_CONFIGS)]
    sizes = [
        part["vocab_size"] for part in parts if isinstance(part, dict) and "vocab_size" in part
    ]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _json(source: Source, name: str) -> dict[str, Any]:
    """Return a side file; {} where there is none that can be read."""
    path = source.folder / name if source.folder is not None else Path()
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
