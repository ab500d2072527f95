"""The tokenizer files of the output: another model's byte for byte, or with what joined."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.tokens.target import Target
from mergekit_ft.tokens.vocabulary import FILES, STALE, TOKENIZER, Vocabulary

Sides = dict[str, Path | bytes | None]  # by name: a file to copy, content, or nothing
LOWER = 10.0  # how far below every piece a joined one lies, in log probability


def output_files(target: Target, donor: Vocabulary) -> Sides:
    """Return what replaces the donor's tokenizer files; nothing where they are the output's."""
    core = target.core
    found: Sides = {}
    if core is not donor:
        found = {name: None for name in donor.files if FILES.fullmatch(name)}
        found |= {name: by for name, by in core.files.items() if FILES.fullmatch(name)}
    if target.new:
        found |= dict.fromkeys(stale_files(target))
        found[TOKENIZER] = tokenizer_json(target)
    return found


def stale_files(target: Target) -> list[str]:
    """Return the files that hold the vocabulary as it was, which the output does without."""
    return [name for name in target.core.files if target.new and STALE.fullmatch(name)]


def tokenizer_json(target: Target) -> bytes:
    """Return tokenizer.json with the tokens that joined; every id is checked by reading it back."""
    content = copy.deepcopy(target.core.content)
    added = {**target.core.added, **target.added}
    joined = {**target.core.ids, **target.ordinary}
    joined |= {token: said["id"] for token, said in target.added.items()}
    if target.ordinary or target.core.more:
        _put_all(content["model"], joined, target.core)
    content["added_tokens"] = [added[token] for token in sorted(added, key=joined.__getitem__)]
    raw = json.dumps(content, ensure_ascii=False, indent=2).encode()
    _require_ids(raw, joined, target.core)
    return raw


def _put_all(model: dict[str, Any], ids: Mapping[str, int], core: Vocabulary) -> None:
    """Give the model proper every token, added ones too, so that none of them moves.

    Pieces of a Unigram model that join are less likely than all others together, so that text is
    cut as before wherever that can be done.
    """
    if isinstance(model["vocab"], dict):
        model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
        return
    pieces = model["vocab"]
    lowest = min((float(piece[1]) for piece in pieces), default=0.0) - LOWER
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise SourceError(
            f"{core.reference}: its Unigram tokenizer has ids without a token, so no ordinary "
            "token can join it; use `source: base`"
        )
    model["vocab"] = [*pieces, *([token, lowest] for token in tokens[len(pieces) :])]


def _require_ids(raw: bytes, ids: Mapping[str, int], core: Vocabulary) -> None:
    """Read a tokenizer back: every token must have the id that its row has."""
    from tokenizers import Tokenizer

    try:
        read = Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises plain exceptions
        raise SourceError(f"{core.reference}: no token can join its tokenizer: {error}") from None
    wrong = [token for token, number in ids.items() if read.token_to_id(token) != number]
    if wrong:
        told = ", ".join(map(repr, wrong[:3]))
        raise SourceError(
            f"{core.reference}: {len(wrong)} tokens ({told}) would not keep their ids in a larger "
            "tokenizer; use `source: base`"
        )
