"""Small models with tokenizers: rows that can be told apart, vocabularies given or trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tests.checkpoints import write_checkpoint

WIDTH = 4
TEXTS = (
    "the quick brown fox jumps over the lazy dog again and again the dog the fox " * 3,
    "pack my box with five dozen liquor jugs and a zebra waltz quickly over vexed nymphs " * 3,
    "sphinx of black quartz judge my vow and the dog will pack the box " * 3,
)
SPECIAL = ("<s>", "</s>", "<unk>")


def words(*tokens: str, added: Sequence[str] = ()) -> Tokenizer:
    """Return a tokenizer of whole words, in this order, and then added tokens."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, tokens[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return made


def trained(kind: str, text: int, size: int, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Train a BPE, WordPiece or Unigram tokenizer on one of the texts."""
    options: dict[str, Any] = {"vocab_size": size, "special_tokens": list(special)}
    options["show_progress"] = False
    if kind == "BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(**options)
    elif kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token="<unk>")
    made.train_from_iterator([TEXTS[text]], trainer)
    return made


def embedding(model: int, rows: int, width: int = WIDTH) -> Tensor:
    """Return rows: row i of model m is 100 m + i, each column 0.25 more than the one before."""
    numbers = 100.0 * model + torch.arange(rows, dtype=torch.float32)
    return numbers[:, None] + 0.25 * torch.arange(width)


def write_model(
    folder: Path,
    model: int,
    tokenizer: Tokenizer | None,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **extra: Tensor,
) -> Path:
    """Write an embedding, an untied head of the negative rows, a norm, and a tokenizer."""
    rows = tokenizer.get_vocab_size() if rows is None and tokenizer is not None else rows
    assert rows is not None
    table = embedding(model, rows).to(dtype)
    tensors = {
        "model.embed_tokens.weight": table,
        "model.layers.0.mlp.up_proj.weight": torch.full((WIDTH, WIDTH), 1.0 + model).to(dtype),
        "model.norm.weight": torch.ones(WIDTH, dtype=dtype),
        "lm_head.weight": -table,
        **extra,
    }
    said = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": rows}
    write_checkpoint(folder, tensors, config={**said, **(config or {})})
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        kept = {"tokenizer_class": "PreTrainedTokenizerFast", **(settings or {})}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def ids(folder: str | Path) -> dict[str, int]:
    """Return the tokens of a checkpoint."""
    found: dict[str, int] = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).get_vocab()
    return found


def linear(*weights: float, more: str = "", names: Sequence[str] = ("a", "b", "c")) -> str:
    """Return a plan over ./a, ./b and so on; the first of them is the base."""
    entries = "".join(
        f"  - {{model: ./{name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in zip(names, weights, strict=False)
    )
    head = f"merge_method: linear\nbase_model: ./{names[0]}\n"
    return f"{head}models:\n{entries}parameters: {{normalize: false}}\n{more}"
