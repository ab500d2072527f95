"""Vocabularies aligned by both toolkits: every token's row is the same, whatever its id.

New ids are arbitrary there, so rows are compared by token string. There, padding rows of the
originals are dropped and ordinary tokens become added ones; here rows stay and text is cut as the
base cuts it. Neither changes the row of a token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import mergekit_ft
from tests.checkpoints import tiny_gpt2, tiny_llama, tiny_qwen2
from tests.peers.peer import Peer, Plan, tensors_of, text_of
from tests.vocabularies import SPECIAL, ids, trained

pytestmark = pytest.mark.peer

REAL = os.environ.get("MERGEKIT_FT_TOKENIZERS")  # a folder of folders with a tokenizer.json each
ENDS = ("<unk>", "<|endoftext|>")  # that transformers would add to a tokenizer of Qwen2 or GPT-2
CHATML = ("<unk>", "<|im_start|>", "<|im_end|>", "</s>")


def write(
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    build: Callable[..., Path] = tiny_llama,
    **config: Any,
) -> str:
    """Write a random model for a tokenizer."""
    build(folder, seed=seed, vocab_size=tokenizer.get_vocab_size(), layers=1, **config)
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return three models of unlike vocabularies."""
    folder = tmp_path_factory.mktemp("models")
    made = [
        trained("BPE", 0, 60, SPECIAL),
        trained("BPE", 1, 70, CHATML),
        trained("BPE", 2, 64, (*SPECIAL, "<tool>")),
    ]
    return [write(folder / str(i), tokenizer, i) for i, tokenizer in enumerate(made)]


def plan_of(models: list[str], tokenizer: Any, method: str = "linear", **more: Any) -> Plan:
    """Return a merge of all models in float32, the first of them the base."""
    weights = (0.5, 0.3, 0.4)
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=False)
    ]
    entries = entries if method == "linear" else entries[1:]
    words = {"tokenizer": tokenizer} if isinstance(tokenizer, dict) else {}
    words |= {"tokenizer_source": tokenizer} if isinstance(tokenizer, str) else {}
    head = {"merge_method": method, "base_model": models[0], "dtype": "float32"}
    return {**head, "models": entries, **words, **more}


def aligned(peer: Peer, plan: Plan, out: Path) -> dict[str, float]:
    """Carry out a plan by both; return, by tensor, the largest relative distance."""
    theirs = peer.write(plan)
    mergekit_ft.merge(text_of(plan), out)
    mine, other = tensors_of(out), tensors_of(theirs)
    my_ids, their_ids = ids(out), ids(theirs)
    assert mine.keys() == other.keys()
    assert my_ids.keys() == their_ids.keys()
    tokens = sorted(my_ids)
    found = {}
    for name, ours in mine.items():
        if ours.shape == other[name].shape and ours.shape[0] <= max(my_ids.values()):
            found[name] = _apart(ours, other[name])
        else:
            ours = ours[[my_ids[token] for token in tokens]]
            found[name] = _apart(ours, other[name][[their_ids[token] for token in tokens]])
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    scale = max(float(other.abs().max()), 1e-30)
    return float((one.double() - other.double()).abs().max()) / scale


def require_close(found: dict[str, float]) -> None:
    assert {name: apart for name, apart in found.items() if apart > 1e-6} == {}


@pytest.mark.parametrize("source", ["union", "base", 1, 2])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_every_token_has_the_same_row(
    peer: Peer, models: list[str], tmp_path: Path, source: Any, method: str
) -> None:
    chosen = source if isinstance(source, str) else models[source]
    for words in ({"source": chosen}, chosen):
        plan = plan_of(models, words, method)
        require_close(aligned(peer, plan, tmp_path / str(type(words).__name__)))


@pytest.mark.parametrize(
    "tokens",
    [
        {"<|im_start|>": {"source": 1}},
        {"</s>": {"source": 1, "force": True}, "the": {"source": 2, "force": True}},
        {"<s>": {"source": {"kind": "model_token", "model": 1, "token": "<unk>"}, "force": True}},
        {"<s>": {"source": {"kind": "model_token", "model": 2, "token_id": 7}, "force": True}},
        {"<tool>": {"source": {"kind": "zero"}}},
        {"<new>": {"source": {"kind": "model_token", "model": 0, "token": "<s>"}}},
        {"<new>": {"source": {"kind": "zero"}}, "the": {"source": 0}},
    ],
)
def test_rows_that_a_plan_chooses_are_the_same(
    peer: Peer, models: list[str], tmp_path: Path, tokens: dict[str, Any]
) -> None:
    def named(words: Any) -> Any:
        if not isinstance(words, dict):
            return words
        paths = {
            key: models[words[key]] for key in ("source", "model") if type(words.get(key)) is int
        }
        return {key: named(value) for key, value in words.items()} | paths

    plan = plan_of(models, {"source": "union", "tokens": named(tokens)})
    require_close(aligned(peer, plan, tmp_path / "out"))


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_padding_to_a_multiple_gives_as_many_rows_and_the_same_ones(
    peer: Peer, models: list[str], tmp_path: Path, multiple: int
) -> None:
    plan = plan_of(models, {"source": "union", "pad_to_multiple_of": multiple})
    require_close(aligned(peer, plan, tmp_path / "out"))
    theirs = tensors_of(peer.write(plan))["model.embed_tokens.weight"]
    mine = tensors_of(tmp_path / "out")["model.embed_tokens.weight"]
    assert mine.shape == theirs.shape
    n = len(ids(tmp_path / "out"))
    if len(mine) > n:
        assert _apart(mine[n:], theirs[n:]) <= 1e-6


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_qwen2, {}),
        (tiny_gpt2, {}),
        (tiny_llama, {"tie_word_embeddings": True}),
    ],
)
def test_other_architectures_and_ties_are_aligned_alike(
    peer: Peer, tmp_path: Path, build: Callable[..., Path], config: dict[str, Any]
) -> None:
    models = [
        write(tmp_path / "a", trained("BPE", 0, 60, ENDS), 0, build, **config),
        write(tmp_path / "b", trained("BPE", 1, 70, (*ENDS, "<i>")), 1, build, **config),
    ]
    require_close(aligned(peer, plan_of(models, "union"), tmp_path / "out"))


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_unlike_kinds_of_tokenizers_are_aligned_alike(
    peer: Peer, tmp_path: Path, kind: str
) -> None:
    models = [
        write(tmp_path / "a", trained("BPE", 0, 60), 0),
        write(tmp_path / "b", trained(kind, 1, 70, CHATML), 1),
    ]
    require_close(aligned(peer, plan_of(models, "union"), tmp_path / "out"))
    require_close(aligned(peer, plan_of(models[::-1], "union"), tmp_path / "turned"))


def test_without_a_base_the_mean_of_unlike_rows_is_the_same(
    peer: Peer, models: list[str], tmp_path: Path
) -> None:
    plan = plan_of(models, {"source": models[0]})
    del plan["base_model"]
    require_close(aligned(peer, plan, tmp_path / "out"))


def test_padding_rows_that_the_peer_drops_are_kept(peer: Peer, tmp_path: Path) -> None:
    models = [write(tmp_path / name, trained("BPE", i, 60 + i), i) for i, name in enumerate("ab")]
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    tiny_llama(tmp_path / "a", seed=5, vocab_size=tokenizer.get_vocab_size() + 16, layers=1)
    plan = plan_of(models, "base")
    require_close(aligned(peer, plan, tmp_path / "out"))
    rows = len(tensors_of(tmp_path / "out")["model.embed_tokens.weight"])
    theirs = len(tensors_of(peer.write(plan))["model.embed_tokens.weight"])
    assert (rows, theirs) == (tokenizer.get_vocab_size() + 16, tokenizer.get_vocab_size())


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="MERGEKIT_FT_TOKENIZERS names no folder of tokenizers")
def test_unions_of_two_real_tokenizers_are_equal_row_by_row(peer: Peer, tmp_path: Path) -> None:
    found = sorted(Path(str(REAL)).glob("*/tokenizer.json"))
    assert len(found) == 2
    models = [
        write(tmp_path / str(i), Tokenizer.from_file(str(path)), i) for i, path in enumerate(found)
    ]
    for number, order in enumerate((models, models[::-1])):
        plan = plan_of(order, "union")
        plan["parameters"] = {"normalize": False}
        apart = aligned(peer, plan, tmp_path / f"out{number}")
        require_close(apart)
        assert torch.isfinite(tensors_of(tmp_path / f"out{number}")["lm_head.weight"]).all()
