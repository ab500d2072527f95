"""Second moments of keys over a text: against plain sums, remembered, and refused where too few."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.editing import moments
from mergekit_ft.editing.corpus import Corpus, open_corpus
from mergekit_ft.editing.moments import Library
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.layers import places
from mergekit_ft.sources import open_source
from tests.small_models import models  # noqa: F401

WIDTH = 6
LINE = "The quick brown fox jumps over the lazy dog, 0123456789.\n"


def vectors(layer: int) -> Tensor:
    """Return a key for each token: what a layer would make of it."""
    dice = torch.Generator().manual_seed(layer)
    return torch.randn(300, WIDTH, generator=dice)


class Counted:
    """Stands in for the model: gives keys, and counts the windows it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, ...]] = []  # layers asked for, once a round

    def __call__(
        self, windows: Sequence[tuple[int, ...]], layers: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        self.shown.append(tuple(layers))
        for layer in layers:
            for window in windows:
                yield layer, vectors(layer)[list(window)]


def text(folder: Path, lines: int, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(LINE * lines, encoding="utf-8")
    return path


def library(path: Path, keys: Any, said: list[str] | None = None, window: int = 512) -> Library:
    source = open_source("base")
    corpus = open_corpus(path, byte_tokenizer(), window)
    matrices = {layer: f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)}
    say = [].append if said is None else said.append
    return Library(source, places(source), corpus, keys, matrices, say)


def plainly(path: Path, layer: int, tokens: int) -> Tensor:
    """Return (1/T) sum k k^T over the first tokens of a text, key by key."""
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    ids = byte_tokenizer()(path.read_text())["input_ids"][:tokens]
    for token in ids:
        key = vectors(layer)[token].double()
        total += torch.outer(key, key)
    return total / len(ids)


def test_c_is_the_mean_outer_product_over_all_tokens(tmp_path: Path) -> None:
    path = text(tmp_path, 40)
    found = library(path, Counted()).of([0, 2])
    tokens = 40 * len(LINE)
    for layer in (0, 2):
        assert found[layer].tokens == tokens
        expected = plainly(path, layer, tokens)
        assert torch.allclose(found[layer].second, expected, rtol=1e-12, atol=1e-14)


def test_a_layer_takes_text_until_it_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "ROUND", 10 * len(LINE))
    said: list[str] = []
    keys = Counted()
    found = library(text(tmp_path, 200), keys, said).of([1])
    assert found[1].tokens < 200 * len(LINE)
    assert found[1].change < 1e-3
    assert len(keys.shown) == len(said) >= 2
    assert found[1].told()["settled"] is True
    assert "changed by" in said[-1]


def test_text_that_ends_before_c_settles_is_used_whole_and_said_to_be_unsettled(
    tmp_path: Path,
) -> None:
    found = library(text(tmp_path, 3), Counted()).of([1])[1]
    assert found.tokens == 3 * len(LINE)
    assert found.told() == {
        "tokens": 3 * len(LINE),
        "corpus_sha256": found.corpus,
        "last_change": None,
        "settled": False,
    }


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"57 tokens are too few for keys of 6 .* at least 60"):
        library(text(tmp_path, 1), Counted()).of([0])
    assert not list(tmp_path.rglob("*.safetensors.*"))


def test_what_was_gathered_is_remembered_to_the_bit(tmp_path: Path) -> None:
    path, first, again = text(tmp_path, 40), Counted(), Counted()
    before = library(path, first).of([0, 1])
    after = library(path, again).of([0, 1])
    assert first.shown and not again.shown
    for layer in (0, 1):
        assert torch.equal(before[layer].second, after[layer].second)
        assert before[layer].told() == after[layer].told()
    more = Counted()
    library(path, more).of([0, 1, 2])
    assert set(more.shown) == {(2,)}


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "statistics").glob("*"))


def test_other_weights_below_another_text_or_another_window_are_gathered_anew(
    tmp_path: Path,
) -> None:
    path = text(tmp_path, 40)
    library(path, Counted()).of([0, 1])
    assert len(cached(tmp_path)) == 2
    (file,) = (tmp_path / "base").glob("*.safetensors")
    from safetensors.torch import load_file

    held = load_file(file)
    held["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(held, file, {"format": "pt"})
    keys = Counted()
    library(path, keys).of([0, 1])
    assert set(keys.shown) == {(1,)}, "layer 0 lies below the change"
    keys = Counted()
    library(text(tmp_path, 41, "other.txt"), keys).of([0])
    assert keys.shown
    keys = Counted()
    library(path, keys, window=100).of([0])
    assert keys.shown


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_file_is_made_again_with_a_word(tmp_path: Path, damage: str) -> None:
    path = text(tmp_path, 40)
    before = library(path, Counted()).of([0])[0]
    (file,) = cached(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    file.write_bytes(
        {"cut": bytes(data[:-8]), "flip": bytes(data), "empty": b"", "text": b"{}" * 40}[damage]
    )
    keys = Counted()
    made = library(path, keys)
    after = made.of([0])[0]
    assert keys.shown and torch.equal(before.second, after.second)
    (note,) = made.notes
    assert "is damaged" in note and str(file) in note
    assert library(path, Counted()).of([0])[0].tokens == after.tokens


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    made = library(text(tmp_path, 40), Counted())
    assert made.of([0])[0].tokens == 40 * len(LINE)
    (note,) = made.notes
    assert "could not be written" in note


def test_a_writer_that_dies_leaves_no_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(one: Any, other: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        library(text(tmp_path, 40), Counted()).of([0])
    assert not [file for file in cached(tmp_path) if file.suffix == ".safetensors"]


def test_keys_that_are_no_numbers_are_refused_and_not_remembered(tmp_path: Path) -> None:
    def keys(windows: Any, layers: Any) -> Iterator[tuple[int, Tensor]]:
        for _ in windows:
            yield 0, torch.full((600, WIDTH), float("nan"))

    with pytest.raises(OperatorError, match="NaN"):
        library(text(tmp_path, 40), keys).of([0])
    assert not cached(tmp_path)


# --- text ---------------------------------------------------------------------------------------


def windows(path: Path, window: int = 512) -> list[tuple[int, ...]]:
    return list(open_corpus(path, byte_tokenizer(), window).windows())


def test_rows_are_documents_and_no_window_goes_over_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["abcdefg", "hi", "", "jklmnopqrs"]
    path.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts) + "\n")
    tokenizer = byte_tokenizer()
    said = [tokenizer.decode(window) for window in windows(path, 4)]
    assert said == ["abcd", "efg", "hi", "jklm", "nopq", "rs"]


def test_plain_text_is_read_in_stretches_of_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_ft.editing.corpus.STRETCH", 2 * len(LINE))
    path = text(tmp_path, 5)
    tokenizer = byte_tokenizer()
    said = [tokenizer.decode(window) for window in windows(path)]
    assert said == [LINE * 2, LINE * 2, LINE]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2: a row of text is"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: a row of text is"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SourceError, match=told):
        windows(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        windows(tmp_path / "none.txt")


def test_lots_hold_all_windows_in_order(tmp_path: Path) -> None:
    corpus: Corpus = open_corpus(text(tmp_path, 20), byte_tokenizer(), 50)
    lots = list(corpus.rounds(120))
    assert [window for lot in lots for window in lot] == list(corpus.windows())
    assert all(sum(map(len, lot)) >= 120 for lot in lots[:-1])
