"""Alignment as pure data, vocabularies as hostile input, and which tensors have rows for tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ft.errors import SourceError
from mergekit_ft.tokens.alignment import FILLER, MEAN, ZEROS, Alignment, Choice, Holder, align
from mergekit_ft.tokens.indexed import may_be_indexed
from mergekit_ft.tokens.rows import runs_of
from mergekit_ft.tokens.specials import moved
from mergekit_ft.tokens.target import union
from mergekit_ft.tokens.vocabulary import Vocabulary, files_in, read_vocabulary
from tests.vocabularies import words, write_model

_INDEXED = """
model.embed_tokens.weight lm_head.weight lm_head.bias transformer.wte.weight shared.weight
encoder.embed_tokens.weight bert.embeddings.word_embeddings.weight cls.predictions.bias
cls.predictions.decoder.weight gpt_neox.embed_in.weight embed_out.weight final_logits_bias
model.language_model.embed_tokens.weight backbone.embeddings.weight vocab_projector.bias
model.layers.61.shared_head.head.weight transformer.output_layer.weight proj_out.weight
text_model.embeddings.token_embedding.weight lm_head.decoder.weight
"""
_NEAR = """
transformer.wpe.weight model.decoder.embed_positions.weight model.norm.weight score.weight
bert.embeddings.position_embeddings.weight bert.embeddings.token_type_embeddings.weight
bert.embeddings.LayerNorm.weight cls.predictions.transform.dense.weight classifier.weight
model.visual.patch_embed.proj.weight vision_model.embeddings.class_embedding qa_outputs.weight
model.layers.0.mlp.up_proj.weight encoder.block.0.layer.0.SelfAttention.q.weight
bert.encoder.layer.0.output.dense.weight bert.embeddings.position_ids
"""
INDEXED, NEAR = _INDEXED.split(), _NEAR.split()


def simple(target: dict[str, int], rows: int, *holders: Holder, **more: Any) -> Alignment:
    given_ = {"base": 0, "choices": {}, "forced": (), **more}
    return align(target, rows, holders, **given_)


def places(alignment: Alignment, me: int) -> list[tuple[int, int]]:
    part = alignment.parts[me]
    return list(zip(part.which.tolist(), part.old.tolist(), strict=True))


def test_every_way_to_a_row_by_hand() -> None:
    target = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    base = Holder({"a": 0, "b": 1}, 2)
    one = Holder({"b": 0, "c": 1, "d": 2}, 4)  # and a padding row
    two = Holder({"d": 0, "a": 1}, 2)
    found = simple(target, 7, base, one, two, choices={"e": Choice(1, 3)}, forced=["b"])
    assert places(found, 0) == [(0, 0), (0, 1), (1, 1), (MEAN, 0), (1, 3), (FILLER, 0), (FILLER, 0)]
    assert places(found, 1)[:4] == [(0, 0), (0, 1), (1, 1), (1, 2)]
    assert places(found, 2)[:4] == [(2, 1), (0, 1), (1, 1), (2, 0)]
    assert found.means == {3: ((1, 2), (2, 0))}
    assert found.orphans == ()
    assert dict(found.parts[1].counts) == {
        "kept": 0,
        "moved": 2,
        "added": 3,
        "padded": 2,
        "dropped": 2,
    }


def test_a_choice_of_zeros_and_a_token_that_nobody_has() -> None:
    found = simple({"a": 0, "z": 1, "q": 2}, 3, Holder({"a": 0}, 1), choices={"z": Choice()})
    assert places(found, 0)[:2] == [(0, 0), (ZEROS, 0)]
    assert found.orphans == (2,)


names = st.sampled_from([f"t{i}" for i in range(12)])
vocabularies = st.lists(names, unique=True, min_size=1, max_size=8)


@given(st.lists(vocabularies, min_size=1, max_size=3), st.integers(0, 4))
def test_a_union_gives_every_token_of_every_model_its_own_row(
    lists: list[list[str]], padding: int
) -> None:
    made = [_vocabulary(tokens) for tokens in lists]
    target = union(made[0], [(v, len(v.ids) + padding) for v in made])
    assert target.ids.keys() == {token for tokens in lists for token in tokens}
    assert sorted(target.ids.values()) == list(range(len(target.ids)))
    holders = [Holder(v.ids, len(v.ids) + padding) for v in made]
    found = simple(target.ids, len(target.ids) + padding, *holders)
    assert found.orphans == ()
    for me, vocabulary in enumerate(made):
        for token, old in vocabulary.ids.items():
            assert places(found, me)[target.ids[token]] == (me, old)
        expanded = [
            (run.which, run.old + (i if run.which >= 0 else 0))
            for run in runs_of(found.parts[me])
            for i in range(run.stop - run.start)
        ]
        assert expanded == places(found, me)


def _vocabulary(tokens: list[str]) -> Vocabulary:
    content = {"model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}}
    return Vocabulary("made", content, {}, "", {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ("{}", "not one of the tokenizers library (KeyError"),
        ('{"model": {"vocab": {"a": "x"}}}', "not one of the tokenizers library (ValueError"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "KeyError: 'content'"),
        ('{"model": {"vocab": {"a": 0, "b": 0}}}', "gives id 0 to 'a' and to 'b'"),
        ('{"model": {"vocab": {"a": 0, "b": 99999999999}}}', "id 99999999999 for 'b'"),
        ('{"model": {"vocab": {"a": 0, "b": -1}}}', "id -1 for 'b'"),
    ],
)
def test_a_tokenizer_that_cannot_be_one_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"\./model: tokenizer\.json") as caught:
        read_vocabulary(files_in(tmp_path), "./model")
    assert said in str(caught.value)


def test_tokens_of_other_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    write_model(tmp_path, 1, words("x", "cat", added=["<s>"]))
    decoder = {"3": {"content": "<t>", "special": True}, "1": {"content": "cat"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<u>": 4}))
    found = read_vocabulary(files_in(tmp_path), "./model")
    assert found is not None
    assert found.ids == {"x": 0, "cat": 1, "<s>": 2, "<t>": 3, "<u>": 4}


def test_a_tokenizer_without_tokenizer_json_is_made_by_transformers(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    found = read_vocabulary(files_in(tmp_path), "./model")
    assert found is not None
    assert found.ids == {token: i for i, token in enumerate(tokens)}


def test_a_tokenizer_that_nobody_reads_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1\2")
    with pytest.raises(SourceError, match=r"has no tokenizer\.json.*save it once with"):
        read_vocabulary(files_in(tmp_path), "./model")


@pytest.mark.parametrize(
    "name",
    INDEXED,
)
def test_embeddings_heads_and_their_biases_have_rows_for_tokens(name: str) -> None:
    assert may_be_indexed(name)


@pytest.mark.parametrize(
    "name",
    NEAR,
)
def test_what_lies_near_them_has_none(name: str) -> None:
    assert not may_be_indexed(name)


def test_ids_that_are_lists_unset_or_below_zero() -> None:
    old, new = {1: "a", 2: "b"}, {"a": 7, "b": 2}
    config = {
        "eos_token_id": [1, 2],
        "pad_token_id": -1,
        "bos_token_id": None,
        "image_token_index": 1,
        "text_config": {"eos_token_id": 1},
        "forced_bos_token_id": 9,
        "vocab_size": 1,
    }
    found = moved(config, old, new, {})
    assert found.edits == {
        "eos_token_id": [7, 2],
        "image_token_index": 7,
        "text_config.eos_token_id": 7,
    }
    assert found.unknown == ("forced_bos_token_id 9 ('id 9')",)
