"""Rows aligned by token string: every case worked by hand on rows that can be told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_ft
from tests.small_models import cli, hashes, merged, no_reading, refused, tensors
from tests.vocabularies import embedding, ids, linear, trained, words, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def row(model: int, number: int) -> Tensor:
    """Return a row of a model as `embedding` has it."""
    return embedding(model, number + 1)[number]


def by_token(name: str = EMBEDDING, out: str = "out") -> dict[str, Tensor]:
    """Return each token's row in the output."""
    table = tensors(out)[name]
    return {token: table[number] for token, number in ids(out).items()}


def two() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog", added=["<s>"]))
    write_model(Path("b"), 2, words("x", "dog", "emu", "cat", added=["<s>", "<i>"]))


def test_a_token_meets_itself_wherever_its_row_lies() -> None:
    two()
    merged(linear(0.5, 0.5, more="tokenizer_source: base\n"))
    found = by_token()
    assert ids("out") == ids("a")
    assert torch.equal(found["cat"], 0.5 * row(1, 1) + 0.5 * row(2, 3))
    assert torch.equal(found["dog"], 0.5 * row(1, 2) + 0.5 * row(2, 1))
    assert torch.equal(found["<s>"], 0.5 * row(1, 3) + 0.5 * row(2, 4))
    assert torch.equal(by_token(HEAD)["dog"], -0.5 * row(1, 2) - 0.5 * row(2, 1))


def test_a_union_adds_ordinary_tokens_then_added_ones_in_order_of_id() -> None:
    two()
    write_model(Path("c"), 3, words("x", "gnu", added=["<c>"]))
    merged(linear(0.5, 0.25, 0.25, more="tokenizer: {source: union}\n"))
    names = sorted(ids("out"), key=ids("out").__getitem__)
    assert names == ["x", "cat", "dog", "<s>", "emu", "gnu", "<i>", "<c>"]
    assert tensors()[EMBEDDING].shape == (8, 4)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 8


def test_a_model_that_lacks_a_token_takes_the_only_row_there_is() -> None:
    two()
    merged(linear(0.5, 0.5, more="tokenizer: {source: union}\n"))
    assert torch.equal(by_token()["emu"], row(2, 2))


def test_of_several_rows_the_base_has_the_word() -> None:
    write_model(Path("a"), 1, words("x", "cat"))
    write_model(Path("b"), 2, words("x", "cat"))
    write_model(Path("c"), 3, words("x"))
    merged(linear(0.0, 0.0, 1.0, more="tokenizer_source: base\n"))
    assert torch.equal(by_token()["cat"], row(1, 1))


def test_of_several_rows_without_the_base_the_mean_is_taken() -> None:
    write_model(Path("a"), 1, words("x"))
    write_model(Path("b"), 2, words("x", "cat"))
    write_model(Path("c"), 3, words("x", "emu", "cat"))
    merged(linear(0.5, 0.0, 0.0, more="tokenizer_source: union\n"))
    assert torch.equal(by_token()["cat"], (row(2, 1) + row(3, 2)) / 4)


def test_a_mean_of_bfloat16_rows_is_rounded_once() -> None:
    write_model(Path("a"), 1, words("x"), dtype=torch.bfloat16)
    write_model(Path("b"), 2, words("x", "cat"), dtype=torch.bfloat16)
    write_model(Path("c"), 3, words("x", "emu", "cat"), dtype=torch.bfloat16)
    merged(linear(0.3, 0.4, 0.3, more="tokenizer_source: union\n"))
    two_, three = (row(m, n).bfloat16().float() for m, n in ((2, 1), (3, 2)))
    exact = 0.3 * (two_.double() + three) / 2 + 0.4 * two_.double() + 0.3 * three.double()
    assert by_token()["cat"].dtype == torch.bfloat16
    assert torch.equal(by_token()["cat"], exact.bfloat16())


def test_a_forced_row_replaces_a_models_own() -> None:
    two()
    more = "tokenizer: {source: base, tokens: {dog: {source: ./b, force: true}}}\n"
    merged(linear(0.5, 0.5, more=more))
    assert torch.equal(by_token()["dog"], row(2, 1))
    assert torch.equal(by_token()["cat"], 0.5 * row(1, 1) + 0.5 * row(2, 3))


def test_a_token_may_take_the_row_of_another_by_text_or_by_number() -> None:
    two()
    more = """\
tokenizer:
  tokens:
    cat: {source: {kind: model_token, model: ./b, token: emu}, force: true}
    dog: {source: {kind: model_token, model: ./a, token_id: 3}, force: true}
"""
    merged(linear(0.5, 0.5, more=more))
    assert torch.equal(by_token()["cat"], row(2, 2))
    assert torch.equal(by_token()["dog"], row(1, 3))


def test_a_chosen_row_is_for_models_that_lack_the_token_only() -> None:
    two()
    more = "tokenizer: {tokens: {emu: {source: {kind: zero}}}}\n"
    merged(linear(0.5, 0.5, more=more))
    assert torch.equal(by_token()["emu"], 0.5 * row(2, 2))


def test_a_new_token_may_start_from_zeros_or_from_a_row() -> None:
    two()
    more = """\
tokenizer:
  source: base
  tokens:
    <new>: {source: {kind: zero}}
    <tool>: {source: {kind: model_token, model: ./b, token: <i>}}
"""
    merged(linear(0.5, 0.5, more=more))
    assert torch.equal(by_token()["<new>"], torch.zeros(4))
    assert torch.equal(by_token()["<tool>"], row(2, 5))


def test_the_vocabulary_of_a_model_comes_with_its_files_byte_for_byte() -> None:
    two()
    Path("a/special_tokens_map.json").write_text("{}")
    Path("b/merges.txt").write_text("# mine\n")
    merged(linear(0.5, 0.5, more="tokenizer: {source: ./b}\n"))
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        assert Path("out", name).read_bytes() == Path("b", name).read_bytes()
    assert not Path("out/special_tokens_map.json").exists()
    assert torch.equal(by_token()["dog"], 0.5 * row(1, 2) + 0.5 * row(2, 1))
    assert torch.equal(by_token()["emu"], row(2, 2))


def test_a_union_that_adds_nothing_leaves_the_files_as_they_are() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog", added=["<s>"]))
    write_model(Path("b"), 2, words("x", "dog"))
    Path("a/vocab.txt").write_text("x\ncat\ndog\n")
    merged(linear(0.5, 0.5, more="tokenizer: {source: union}\n"))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
        assert Path("out", name).read_bytes() == Path("a", name).read_bytes()


def test_models_of_one_vocabulary_come_out_as_without_the_key() -> None:
    write_model(Path("a"), 1, words("x", "cat"))
    write_model(Path("b"), 2, words("x", "cat"))
    merged(linear(0.3, 0.6), "plain")
    merged(linear(0.3, 0.6, more="tokenizer: {}\n"), "aligned")
    assert hashes("plain")["model.safetensors"] == hashes("aligned")["model.safetensors"]


def test_padding_rows_stay_where_the_base_has_them() -> None:
    write_model(Path("a"), 1, words("x", "cat"), rows=6)
    write_model(Path("b"), 2, words("x", "emu", "cat"), rows=5)
    merged(linear(0.5, 0.5, more="tokenizer_source: base\n"))
    table = tensors()[EMBEDDING]
    assert table.shape == (6, 4)
    assert torch.equal(table[3], 0.5 * row(1, 3) + 0.5 * row(2, 3))  # padding of both
    assert torch.equal(table[2], row(1, 2))  # a token of b, which the base has none for
    assert torch.equal(table[5], row(1, 5))


def test_tokens_that_join_take_the_padding_rows_first() -> None:
    write_model(Path("a"), 1, words("x", "cat"), rows=4)
    write_model(Path("b"), 2, words("x", "emu", "cat"))
    merged(linear(0.5, 0.5, more="tokenizer_source: union\n"))
    assert tensors()[EMBEDDING].shape == (4, 4)
    assert ids("out")["emu"] == 2
    assert torch.equal(by_token()["emu"], row(2, 1))


def test_rows_are_padded_to_a_multiple_with_each_models_mean() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog"))
    write_model(Path("b"), 2, words("x", "dog", "cat"))
    more = "tokenizer: {source: union, pad_to_multiple_of: 4}\n"
    merged(linear(0.5, 0.25, more=more))
    table = tensors()[EMBEDDING]
    assert table.shape == (4, 4)
    expected = 0.5 * embedding(1, 3).mean(0) + 0.25 * embedding(2, 3).mean(0)
    torch.testing.assert_close(table[3], expected)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 4


def test_what_is_dropped_padded_and_moved_is_counted() -> None:
    two()
    more = "tokenizer: {source: base, pad_to_multiple_of: 8}\n"
    said = merged(linear(0.5, 0.5, more=more)).output
    assert "./b: rows 6 -> 8: 1 kept, 3 moved, 0 added, 4 padded, 2 dropped" in said
    receipt = json.loads(Path("out/mergekit_ft.lock.json").read_text())["tokenizer"]
    assert receipt["rows"] == 8
    assert receipt["models"]["./b"]["dropped"] == 2
    assert len(receipt["models"]["./a"]["tokenizer"]) == 64


def test_a_base_with_more_tokens_than_rows_gets_rows() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog"), rows=2)
    write_model(Path("b"), 2, words("x", "dog"))
    merged(linear(0.5, 0.5, more="tokenizer_source: base\n"))
    assert torch.equal(by_token()["dog"], row(2, 1))


def test_a_token_that_no_model_has_a_row_for_is_refused() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog"), rows=2)
    write_model(Path("b"), 2, words("x", "cat"))
    said = refused(
        3,
        "no model has a row for 1 token ('dog')",
        linear(0.5, 0.5, more="tokenizer_source: base\n"),
    )
    assert "tokens: {'dog': {source: {kind: zero}}}" in said


def test_a_donor_with_more_tokens_than_rows_is_refused_without_the_key_too() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog"), rows=2)
    write_model(Path("b"), 2, words("x", "cat"), rows=2)
    said = refused(4, "its tokenizer has 1 token ('dog') beyond the 2 rows", linear(0.5, 0.5))
    assert "tokenizer: {source: base}" in said


def test_rows_that_differ_are_refused_with_both_shapes_and_the_remedy() -> None:
    two()
    said = cli("merge", "-", "out", text=linear(0.5, 0.5)).stderr
    assert f"{EMBEDDING} has shape [6, 4], not [4, 4] as in ./a" in said
    assert f"{HEAD} has shape [6, 4], not [4, 4] as in ./a" in said
    assert "`tokenizer: {source: union}` (or base, or a model) aligns their rows by token" in said
    assert not Path("out").exists()


def test_equal_rows_under_other_tokens_are_told() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog"))
    write_model(Path("b"), 2, words("x", "dog", "cat"))
    said = merged(linear(0.5, 0.5)).output
    assert "./b: 2 tokens ('cat', 'dog') of ./a not at the same id in its tokenizer" in said


def test_a_model_without_a_tokenizer_has_the_bases_if_its_rows_are_as_many() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog"))
    write_model(Path("b"), 2, None, rows=3)
    merged(linear(0.5, 0.5, more="tokenizer_source: base\n"))
    assert torch.equal(by_token()["dog"], 0.5 * row(1, 2) + 0.5 * row(2, 2))
    write_model(Path("c"), 3, None, rows=4)
    plan = linear(0.5, 0.5, more="tokenizer_source: base\n", names=("a", "c"))
    refused(4, "./c: has no tokenizer, so its 4 rows cannot be aligned by token", plan, "other")


def test_biases_and_tensors_of_any_rank_are_aligned() -> None:
    two()
    for name, rows in (("a", 4), ("b", 6)):
        number = 1 if name == "a" else 2
        bias = 100.0 * number + torch.arange(rows, dtype=torch.float32)
        tokenizer = None
        write_model(
            Path(name),
            number,
            tokenizer,
            rows=rows,
            **{
                "lm_head.bias": bias,
                "final_logits_bias": bias[None, :].clone(),
                "model.layers.9.shared_head.head.weight": embedding(number, rows) + 0.5,
            },
        )
    merged(linear(0.5, 0.5, more="tokenizer_source: union\n"))
    found = tensors()
    emu, dog = ids("out")["emu"], ids("out")["dog"]
    assert found["lm_head.bias"][[emu, dog]].tolist() == [202.0, 0.5 * 102 + 0.5 * 201]
    assert found["final_logits_bias"].shape == (1, 6)
    assert float(found["final_logits_bias"][0, emu]) == 202.0
    assert torch.equal(found["model.layers.9.shared_head.head.weight"][emu], row(2, 2) + 0.5)


def test_an_embedding_that_is_not_of_these_tokens_is_refused_by_name() -> None:
    write_model(
        Path("a"), 1, words("x", "cat"), **{"model.embed_tokens_per_layer.weight": torch.ones(3, 4)}
    )
    write_model(
        Path("b"), 2, words("x", "emu"), **{"model.embed_tokens_per_layer.weight": torch.ones(3, 4)}
    )
    said = refused(
        4,
        "model.embed_tokens_per_layer.weight of shape [3, 4]",
        linear(0.5, 0.5, more="tokenizer: {}\n"),
    )
    assert "cannot be aligned by token" in said


def test_position_embeddings_of_as_many_rows_stay_as_they_are() -> None:
    two()
    positions = torch.arange(16.0).view(4, 4)
    for name in ("a", "b"):
        number = 1 if name == "a" else 2
        rows = 4 if name == "a" else 6
        write_model(Path(name), number, None, rows=rows, **{"wpe.weight": positions * number})
    merged(linear(0.5, 0.5, more="tokenizer_source: base\n"))
    assert torch.equal(tensors()["wpe.weight"], 1.5 * positions)


def test_ids_of_special_tokens_follow_their_tokens() -> None:
    said = {"bos_token_id": 3, "eos_token_id": [2, 3], "pad_token_id": None}
    write_model(Path("a"), 1, words("x", "cat", "dog", added=["<s>"]), config=said)
    write_model(Path("b"), 2, words("x", "dog", "emu", "cat", added=["<s>", "<i>"]))
    Path("a/generation_config.json").write_text(json.dumps({"eos_token_id": 3, "top_k": 7}))
    merged(linear(0.5, 0.5, more="tokenizer: {source: ./b}\n"))
    config = json.loads(Path("out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (4, [1, 4], 6)
    assert config["pad_token_id"] is None
    generation = json.loads(Path("out/generation_config.json").read_text())
    assert generation == {"eos_token_id": 4, "top_k": 7}


def test_a_special_token_that_is_gone_is_the_tokenizers_own_or_refused() -> None:
    write_model(Path("a"), 1, words("x", "cat", added=["</s>"]), config={"eos_token_id": 2})
    write_model(Path("b"), 2, words("x", "cat", added=["<end>"]))
    plan = linear(0.5, 0.5, more="tokenizer: {source: ./b}\n")
    refused(4, "eos_token_id 2 ('</s>') has no token in the vocabulary of ./b", plan)
    shutil.rmtree("b")
    write_model(Path("b"), 2, words("x", "cat", added=["<end>"]), config={"eos_token_id": 2})
    said = merged(plan).output
    assert "eos_token_id: 2, as the tokenizer's own model has it" in said


def test_the_size_of_a_text_config_is_set() -> None:
    inner = {"vocab_size": 4, "model_type": "llama", "tie_word_embeddings": False}
    write_model(Path("a"), 1, words("x", "cat", "dog", "emu"), config={"text_config": inner})
    config = json.loads(Path("a/config.json").read_text())
    del config["vocab_size"]
    Path("a/config.json").write_text(json.dumps(config))
    write_model(Path("b"), 2, words("x", "gnu"))
    merged(linear(0.5, 0.5, more="tokenizer: {}\n"))
    out = json.loads(Path("out/config.json").read_text())
    assert out["text_config"]["vocab_size"] == 5
    assert "vocab_size" not in out


def test_every_fault_of_the_words_is_found_at_once_before_any_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two()
    no_reading(monkeypatch)
    more = """\
tokenizer:
  tokens:
    ctt: {}
    dog: {source: ./b}
    cat: {source: ./c, force: true}
    emu: {source: {kind: model_token, model: ./b, token: emo}}
    <i>: {source: {kind: model_token, model: ./a, token_id: 4}}
    <s>: {source: ./b, force: true, forse: true}
"""
    lines = cli("check", "-", text=linear(0.5, 0.5, more=more)).stderr.splitlines()
    said = [line for line in lines if line.startswith("plan:")]
    for line, words_ in zip(
        said,
        (
            "no model has the token 'ctt'",
            "'dog' has no effect: every model has it",
            "./c is none of the models that are merged",
            "./b has no row for the token 'emo'; did you mean 'emu'",
            "./a has 4 rows, none of id 4",
            "unknown key 'forse'; did you mean 'force'?",
        ),
        strict=True,
    ):
        assert words_ in line


def test_both_ways_to_choose_a_vocabulary_are_one_too_many() -> None:
    two()
    more = "tokenizer_source: base\ntokenizer: {source: base}\n"
    refused(
        3, "tokenizer_source and tokenizer both choose the vocabulary", linear(1.0, 1.0, more=more)
    )


def test_a_tokenizer_that_is_damaged_is_named() -> None:
    two()
    Path("b/tokenizer.json").write_text('{"model": {"vocab": 3}}')
    said = refused(4, "b: tokenizer.json is not one of", linear(0.5, 0.5, more="tokenizer: {}\n"))
    assert "save it again" in said


@pytest.mark.parametrize("memory", ["4MiB", "1GiB"])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_bytes_do_not_depend_on_budget_or_threads(memory: str, threads: str) -> None:
    for number, name in enumerate(("a", "b", "c")):
        write_model(Path(name), number, trained("BPE", number, 60 + 5 * number))
    plan = linear(0.5, 0.3, 0.2, more="tokenizer: {pad_to_multiple_of: 16}\n")
    merged(plan, "usual")
    merged(plan, "out", "--memory", memory, "--threads", threads)
    assert hashes("usual") == hashes("out")


def test_verify_computes_aligned_rows_again() -> None:
    for number, name in enumerate(("a", "b", "c")):
        write_model(Path(name), number, trained("BPE", number, 60 + 5 * number))
    more = """\
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    <s>: {source: ./b, force: true}
    <new>: {source: {kind: model_token, model: ./c, token_id: 4}}
    <zero>: {source: {kind: zero}}
"""
    merged(linear(0.5, 0.3, 0.2, more=more))
    said = cli("verify", "out", "--full")
    assert said.exit_code == 0, said.output
    assert "4 of 4 tensors computed again" in said.output
    shutil.copy("a/tokenizer.json", "b/tokenizer.json")
    assert cli("verify", "out", "--full").exit_code == 1


def test_a_merge_in_memory_has_the_new_vocabulary() -> None:
    from tests.checkpoints import tiny_llama

    for number, name in enumerate(("a", "b")):
        tokenizer = trained("BPE", number, 60 + 5 * number)
        tiny_llama(Path(name), seed=number, vocab_size=tokenizer.get_vocab_size(), layers=1)
        tokenizer.save(f"{name}/tokenizer.json")
    plan = linear(0.5, 0.5, more="tokenizer_source: union\n")
    model = mergekit_ft.load(plan)
    merged(plan)
    assert model.config.vocab_size == len(ids("out")) == model.lm_head.weight.shape[0]
    assert torch.equal(model.model.embed_tokens.weight, tensors()[EMBEDDING])


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
@pytest.mark.parametrize("other", ["BPE", "WordPiece", "Unigram"])
def test_transformers_reads_a_union_and_every_token_has_its_row(kind: str, other: str) -> None:
    from transformers import AutoTokenizer

    write_model(Path("a"), 1, trained(kind, 0, 60), rows=70)
    write_model(Path("b"), 2, trained(other, 1, 64, ("<unk>", "<i>", "</s>")))
    merged(linear(0.5, 0.5, more="tokenizer: {}\n"))
    read = AutoTokenizer.from_pretrained("out")
    mine, theirs = ids("a"), ids("b")
    assert read.get_vocab().keys() == mine.keys() | theirs.keys()
    for token, number in read.get_vocab().items():
        one = row(1, mine[token]) if token in mine else row(2, theirs[token])
        two_ = row(2, theirs[token]) if token in theirs else row(1, mine[token])
        assert torch.equal(tensors()[EMBEDDING][number], 0.5 * one + 0.5 * two_), token
        assert read.convert_tokens_to_ids(token) == number
    assert read.encode("<i>", add_special_tokens=False) == [read.get_vocab()["<i>"]]


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_union_cuts_text_as_the_base_does(kind: str) -> None:
    from tokenizers import Tokenizer

    write_model(Path("a"), 1, trained(kind, 0, 60))
    write_model(Path("b"), 2, trained(kind, 1, 90))
    merged(linear(0.5, 0.5, more="tokenizer: {}\n"))
    before, after = (Tokenizer.from_file(f"{name}/tokenizer.json") for name in ("a", "out"))
    for text in ("the lazy dog jumps over the brown fox", "again and again"):
        assert before.encode(text).ids == after.encode(text).ids


def test_a_vocabulary_that_grows_is_a_change(tmp_path: Path) -> None:
    two()
    merged(linear(1.0, 0.0, more="tokenizer_source: union\n"))
    table = tensors()[EMBEDDING]
    assert torch.equal(table[:4], embedding(1, 4))
    assert torch.equal(by_token()["emu"], row(2, 2))
    receipt = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    assert [name for name, changed in receipt["changed"].items() if changed] == [HEAD, EMBEDDING]


def test_a_resumed_run_takes_no_journal_of_another_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mergekit_ft.engine import Passes

    two()
    plan = linear(0.5, 0.5, more="tokenizer_source: union\n")

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Passes, "merge", stop)
        assert cli("merge", "-", "out", text=plan).exit_code == 130
    merged(plan, "out", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(Passes, "merge", stop)
        assert cli("merge", "-", "other", text=plan).exit_code == 130
    shutil.copy("a/tokenizer.json", "b/tokenizer.json")
    said = cli("merge", "-", "other", "--resume", text=plan)
    assert said.exit_code != 0, said.output


def test_an_adapter_on_a_model_is_aligned_like_the_model() -> None:
    two()
    (Path("lora")).mkdir()
    from safetensors.torch import save_file

    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    parts = {f"{prefix}A": torch.ones(1, 6), f"{prefix}B": torch.full((4, 1), 2.0)}
    save_file(parts, "lora/adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["embed_tokens"]}
    Path("lora/adapter_config.json").write_text(json.dumps(said))
    plan = linear(0.5, 0.5, more="tokenizer_source: base\n").replace("./b", "./b+./lora")
    merged(plan)
    assert torch.equal(by_token()["dog"], 0.5 * row(1, 2) + 0.5 * (row(2, 1) + 2))


@pytest.mark.parametrize("build", ["tiny_bert", "tiny_t5", "tiny_gpt2", "tiny_qwen2"])
def test_every_tensor_with_rows_for_tokens_is_aligned_in_other_architectures(build: str) -> None:
    import transformers

    from tests import checkpoints

    for number, name in enumerate(("a", "b")):
        tokenizer = trained("BPE", number, 60 + 13 * number)
        size = tokenizer.get_vocab_size()
        getattr(checkpoints, build)(Path(name), seed=number, vocab_size=size, layers=1)
        tokenizer.save(f"{name}/tokenizer.json")
    merged(linear(0.5, 0.5, more="tokenizer_source: union\n"))
    one, other, out = (tensors(name) for name in ("a", "b", "out"))
    mine, theirs, new = (ids(name) for name in ("a", "b", "out"))
    checked = [name for name in out if out[name].shape != one[name].shape]
    assert checked
    for name in checked:
        for token, number in new.items():
            left = one[name][mine.get(token, 0)] if token in mine else other[name][theirs[token]]
            right = other[name][theirs.get(token, 0)] if token in theirs else left
            torch.testing.assert_close(out[name][number], 0.5 * left + 0.5 * right)
    config = transformers.AutoConfig.from_pretrained("out")
    assert config.vocab_size == len(new)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(
        "out", output_loading_info=True
    )
    assert not info["mismatched_keys"]
    assert model.get_input_embeddings().weight.shape[0] == len(new)
