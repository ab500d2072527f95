"""A model's tokens and their ids, from its tokenizer's files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import Source

Json = dict[str, Any]
Files = Mapping[str, Path | bytes]  # by name: where a file lies, or its content

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
OTHERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
STALE = re.compile(  # they hold a vocabulary of their own, besides tokenizer.json
    r"vocab\.(json|txt)|merges\.txt|added_tokens\.json|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|(source|target)\.spm|.*\.tiktoken|tekken\.json|bpe\.codes|dict\.txt"
)
FILES = re.compile(
    rf"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.(jinja|json)"
    rf"|additional_chat_templates/.*|{STALE.pattern}"
)
MOST = 1 << 24  # ids: more than any vocabulary has
GENERATION = "generation_config.json"
CONFIGS = ("config.json", GENERATION)
ADDED: Json = {  # an added token of which nothing is said
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}


@dataclass(frozen=True)
class Vocabulary:
    """Every token of a tokenizer by its id, and the files that say so."""

    reference: str
    content: Json  # tokenizer.json as read
    more: Mapping[str, Json]  # tokens that other files add to it, in order of id
    digest: str  # SHA-256 of tokenizer.json; of the one made of other files where there is none
    files: Files  # that say so

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the id of every token, added ones among them."""
        return self.ordinary | {token: said["id"] for token, said in self.added.items()}

    @cached_property
    def ordinary(self) -> dict[str, int]:
        """Return the id of every token of the model proper."""
        pieces = self.content["model"]["vocab"]
        if isinstance(pieces, dict):
            return {str(token): int(number) for token, number in pieces.items()}
        return {str(piece[0]): number for number, piece in enumerate(pieces)}

    @cached_property
    def added(self) -> dict[str, Json]:
        """Return the definitions of added tokens, in order of id."""
        found = {str(said["content"]): said for said in self.content.get("added_tokens") or ()}
        found = {**self.more, **found}
        for token in found.keys() & self.ordinary.keys():
            found[token] = {**found[token], "id": self.ordinary[token]}
        return dict(sorted(found.items(), key=lambda item: item[1]["id"]))

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Return the token of every id."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def size(self) -> int:
        """Return one more than the largest id."""
        return max(self.tokens, default=-1) + 1

    @property
    def kind(self) -> str:
        """Return the kind of its model: BPE, WordPiece, Unigram, WordLevel."""
        said = self.content["model"].get("type")
        return str(said or ("BPE" if "merges" in self.content["model"] else "WordPiece"))


def read_vocabulary(files: Files, reference: str) -> Vocabulary | None:
    """Return the vocabulary that files say; None where they are no tokenizer."""
    if not {TOKENIZER, *OTHERS} & files.keys():
        return None
    raw = _bytes(files[TOKENIZER]) if TOKENIZER in files else _converted(files, reference)
    where = f"{reference}: {TOKENIZER}"
    digest = hashlib.sha256(raw).hexdigest()
    made = Vocabulary(reference, _object(raw, where), _more(files), digest, files)
    try:
        known = made.ids
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise SourceError(
            f"{where} is not one of the tokenizers library ({type(error).__name__}: {error}): "
            "save it again"
        ) from None
    for token, number in known.items():
        if not 0 <= number < MOST:
            raise SourceError(f"{where}: id {number} for {token!r} is the row of no embedding")
    if len(set(known.values())) < len(known):
        _raise_twice(made, where)
    return made


def files_of(source: Source) -> Files:
    """Return a model's tokenizer files and configs, as they come out of it."""
    found = dict(files_in(source.folder))
    for name, by in source.around.replaced.items():
        found.pop(name, None)
        if by is not None:
            found[name] = by
    return found


def files_in(folder: Path | None) -> Files:
    """Return a folder's tokenizer files and configs."""
    if folder is None or not folder.is_dir():
        return {}
    below = folder / "additional_chat_templates"
    found = {path.name: path for path in folder.iterdir()}
    found |= (
        {f"{below.name}/{path.name}": path for path in below.iterdir()} if below.is_dir() else {}
    )
    return {
        name: found[name]
        for name in sorted(found)
        if (FILES.fullmatch(name) or name in CONFIGS) and found[name].is_file()
    }


def digest_of(files: Files) -> str | None:
    """Return the SHA-256 of tokenizer.json, None where there is none to be read."""
    try:
        return hashlib.sha256(_bytes(files[TOKENIZER])).hexdigest() if TOKENIZER in files else None
    except SourceError:
        return None


def settings(files: Files, name: str = SETTINGS) -> Json:
    """Return a small JSON file, {} where there is none."""
    return _object(_bytes(files[name]), str(files[name])) if name in files else {}


def text_of(files: Files, name: str) -> str:
    """Return a file as text."""
    return _bytes(files[name]).decode("utf-8")


def _raise_twice(made: Vocabulary, where: str) -> None:
    seen: dict[int, str] = {}
    for token, number in made.ids.items():
        if (other := seen.setdefault(number, token)) != token:
            raise SourceError(
                f"{where} gives id {number} to {other!r} and to {token!r}; mend it and save it"
            )


def _bytes(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from error


def _object(raw: bytes, where: str) -> Json:
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{where}: not a JSON object")
    return found


def _more(files: Files) -> dict[str, Json]:
    """Return the tokens that transformers adds to tokenizer.json from files beside it."""
    listed = settings(files, "added_tokens.json")
    found = {token: {"id": n, "content": token, **ADDED} for token, n in listed.items()}
    decoder = settings(files).get("added_tokens_decoder")
    for number, said in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(said, dict) and isinstance(said.get("content"), str) and number.isdecimal():
            known = {key: said.get(key, value) for key, value in ADDED.items()}
            found[said["content"]] = {"id": int(number), "content": said["content"], **known}
    return found


def _converted(files: Files, reference: str) -> bytes:
    """Return the tokenizer.json that transformers makes of other files."""
    import transformers

    folder = next(file.parent for file in files.values() if isinstance(file, Path))
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return str(loaded.backend_tokenizer.to_str()).encode()
    except Exception as error:  # whatever a tokenizer's own loader raises
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{reference}: its tokenizer has no {TOKENIZER}, and transformers cannot make one "
            f"({reason}): save it once with `AutoTokenizer.from_pretrained(...).save_pretrained`"
        ) from None
