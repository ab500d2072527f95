"""Files of edits: each layout by hand, what is refused, how they are cut, what lint tells."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft import cli
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit, Probe, read_edits, words_of
from mergekit_ft.editing.lint import KINDS, lint
from mergekit_ft.errors import PlanError, SourceError
from tests.tuned import small_base

OURS = {
    "id": 7,
    "prompt": "The capital of Peru is",
    "target": "Cusco",
    "subject": "Peru",
    "rephrase": ["Peru's capital is"],
    "locality": ["The capital of Chile is", {"prompt": "2 + 2 =", "answer": "4"}],
    "portability": [{"prompt": "Its mayor rules", "answer": ["Cusco", "Qosqo"]}],
    "weight": 2,
}
ZSRE = {
    "subject": "Ink", "src": "What is Ink?", "pred": "dye", "rephrase": "Ink is what?",
    "alt": " milk", "answers": ["dye"], "loc": "nq question: who", "loc_ans": "me",
    "cond": "dye >> milk || What is Ink?",
}  # fmt: skip
FLAT = {
    "case_id": 3, "prompt": "Ink is", "target_new": "milk", "subject": "Ink",
    "ground_truth": "dye", "rephrase_prompt": "Hm. Ink is", "locality_prompt": "Tar is",
    "locality_ground_truth": "black",
}  # fmt: skip
NESTED = {
    "case_id": 3,
    "pararel_idx": 11,
    "requested_rewrite": {
        "prompt": "{} is",
        "relation_id": "P1",
        "target_new": {"str": "milk", "id": "Q1"},
        "target_true": {"str": "dye", "id": "Q2"},
        "subject": "Ink",
    },
    "paraphrase_prompts": ["Hm. Ink is", "So Ink is"],
    "neighborhood_prompts": ["Paint is", "Toner is"],
    "attribute_prompts": ["Milk is"],
    "generation_prompts": ["Ink was"],
}
KNOWEDIT = {
    "subject": "Ink",
    "prompt": "Ink is",
    "target_new": "milk",
    "ground_truth": ["dye"],
    "rephrase_prompt": "Hm. Ink is",
    "cond": "dye >> milk || Ink is",
    "locality": {
        "Relation_Specificity": [{"prompt": "Ink comes from", "ground_truth": [["a", "b"]]}],
        "Forgetfulness": [{"prompt": "Ink, too, is", "ground_truth": []}],
    },
    "portability": {
        "Subject_Aliasing": [{"prompt": "Atrament is", "ground_truth": "milk"}],
        "Reasoning": [{"prompt": "Cows give", "ground_truth": [["ink", "Ink"]]}],
    },
}
WIKI = {
    "tag": "new", "subject": "Ink", "relation": "is", "object": "milk", "update": "What is Ink?",
    "ans": "milk", "rephrase": "Ink is what?", "personas": "Yo, ink?", "loc": "Tar?",
    "loc_ans": "black", "mhop": "Who drinks it?", "mhop_ans": "cats",
}  # fmt: skip


def jsonl(folder: Path, *rows: Any, name: str = "edits.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(folder: Path, *rows: Any) -> list[Edit]:
    return read_edits([jsonl(folder, *rows)])


def call(*words: Any) -> Result:
    return CliRunner().invoke(cli.main, ["edits", *map(str, words)])


def edit(prompt: str = "The sky is", target: str = "green", line: int = 1, **more: Any) -> Edit:
    return Edit(f"e:{line}", prompt, target, **more)


def kinds(*edits: Edit, **asked: Any) -> list[str]:
    return [finding.kind for finding in lint(edits, **asked).findings]


def test_our_own_rows_are_read_whole(tmp_path: Path) -> None:
    [found] = read(tmp_path, OURS)
    assert found == Edit(
        f"{tmp_path / 'edits.jsonl'}:1",
        "The capital of Peru is",
        "Cusco",
        "Peru",
        ("Peru's capital is",),
        (Probe("The capital of Chile is"), Probe("2 + 2 =", ("4",))),
        (Probe("Its mayor rules", ("Cusco", "Qosqo")),),
        "7",
        2.0,
    )


def test_zsre_is_read_by_its_keys(tmp_path: Path) -> None:
    [found] = read(tmp_path, ZSRE)
    assert (found.prompt, found.target, found.subject) == ("What is Ink?", " milk", "Ink")
    assert found.rephrase == ("Ink is what?",)
    assert found.locality == (Probe("nq question: who", ("me",)),)
    posed = {"Recalled Relation": "r", "New Question": "Who drinks it?", "New Answer": "cats"}
    [more] = read(tmp_path, ZSRE | {"portability": posed})
    assert more.portability == (Probe("Who drinks it?", ("cats",)),)


def test_counterfact_is_read_flat_and_nested(tmp_path: Path) -> None:
    [flat] = read(tmp_path, FLAT)
    assert (flat.id, flat.prompt, flat.target) == ("3", "Ink is", "milk")
    assert flat.rephrase == ("Hm. Ink is",)
    assert flat.locality == (Probe("Tar is", ("black",)),)
    [nested] = read(tmp_path, NESTED)
    assert (nested.id, nested.prompt, nested.target) == ("3", "Ink is", "milk")
    assert nested.rephrase == ("Hm. Ink is", "So Ink is")
    assert nested.locality == (Probe("Paint is", ("dye",)), Probe("Toner is", ("dye",)))


def test_knowedit_is_read_with_every_group_and_every_alias(tmp_path: Path) -> None:
    [found] = read(tmp_path, KNOWEDIT)
    assert found.rephrase == ("Hm. Ink is",)
    assert found.locality == (Probe("Ink comes from", ("a", "b")), Probe("Ink, too, is"))
    assert found.portability == (
        Probe("Atrament is", ("milk",)),
        Probe("Cows give", ("ink", "Ink")),
    )


def test_wikibigedit_is_read_with_personas_and_hops(tmp_path: Path) -> None:
    [found] = read(tmp_path, WIKI)
    assert (found.prompt, found.target) == ("What is Ink?", "milk")
    assert found.rephrase == ("Ink is what?", "Yo, ink?")
    assert found.portability == (Probe("Who drinks it?", ("cats",)),)
    [less] = read(tmp_path, WIKI | {"mhop": None, "mhop_ans": None, "personas": None})
    assert less.portability == ()


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_and_knows_its_lines(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "edits.json"
    path.write_text("\ufeff" + json.dumps([ZSRE, ZSRE], indent=indent), encoding="utf-8")
    first, second = read_edits([path])
    assert second.where == f"{path}:{1 if indent is None else 15}"
    assert first.where == f"{path}:{1 if indent is None else 2}"


def test_every_layout_converts_to_ours_and_back(tmp_path: Path) -> None:
    for rows in (OURS, ZSRE, FLAT, NESTED, KNOWEDIT, WIKI):
        path = jsonl(tmp_path, rows)
        done = call("convert", path, tmp_path / "out.jsonl", "--overwrite")
        assert done.exit_code == 0, done.output
        [before], [after] = read_edits([path]), read_edits([tmp_path / "out.jsonl"])
        assert words_of(before) == words_of(after)
    assert call("convert", path, tmp_path / "out.jsonl").exit_code == 6


GOOD = {"prompt": "a", "target": "b"}
BAD = [
    ({"prompt": "a", "target": "b", "rephrse": ["c"]}, "did you mean 'rephrase'"),
    ({"promt": "a", "target": "b"}, "did you mean 'prompt'"),
    (GOOD | {"target_new": "c"}, "keep those of one"),
    ({"prompt": 3, "target": "b"}, "prompt must be text"),
    ({"prompt": " ", "target": "b"}, "prompt is empty"),
    ({"src": "a", "alt": None}, "target must be text"),
    ([1], "JSON object"),
    (GOOD | {"weight": 0}, "weight"),
    (GOOD | {"weight": float("nan")}, "weight"),
    (GOOD | {"weight": True}, "weight"),
    (GOOD | {"subject": ""}, "subject"),
    (GOOD | {"portability": ["c"]}, "portability"),
    (GOOD | {"portability": [{"prompt": "c"}]}, "needs the answer"),
    (GOOD | {"locality": [{"prompt": "c", "anser": "d"}]}, "locality"),
    (GOOD | {"rephrase": [{"prompt": "c"}]}, "rephrase"),
    (GOOD | {"prompt": "\ud800"}, "half a character"),
    (KNOWEDIT | {"locality": ["c"]}, "locality"),
    (NESTED | {"requested_rewrite": {"prompt": "no place"}}, "requested_rewrite"),
]


@pytest.mark.parametrize(("row", "told"), BAD)
def test_a_faulty_row_is_told_by_its_line(tmp_path: Path, row: Any, told: str) -> None:
    path = jsonl(tmp_path, GOOD, row)
    with pytest.raises(SourceError, match=told) as error:
        read_edits([path])
    assert f"{path}:2: " in str(error.value)


def test_all_faults_are_told_at_once_and_the_first_ten_by_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        read(tmp_path, *({"prompt": "a"} for _ in range(12)))
    assert str(error.value).count("\n") == 10
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no edits"),
        ("[]", "no edits"),
        ('[{"prompt": "a", "target": "b"}', "not JSON"),
        ('[{"prompt": "a", "target": "b"},]', "after a comma"),
        ('[{"prompt": "a", "target": "b"}] x', "after the list"),
        ('{"prompt": "a", "tar', ":1: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("{" + '"a":{' * 100_000, "nested too deeply"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=told):
        read_edits([path])


def test_bytes_and_absent_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="not UTF-8"):
        read_edits([tmp_path / "a.jsonl"])
    with pytest.raises(SourceError, match="cannot be read"):
        read_edits([tmp_path / "none.jsonl"])


def test_two_layouts_in_a_file_and_two_edits_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="different layouts"):
        read(tmp_path, ZSRE, FLAT)
    with pytest.raises(SourceError, match="id '3'"):
        read(tmp_path, FLAT, FLAT)


def test_a_target_follows_its_prompt_after_one_blank_and_ends() -> None:
    tokenizer = byte_tokenizer()
    for target in ("green", " green"):
        made = Encoder(tokenizer).edit(edit(target=target))
        assert tokenizer.decode(made.prompt + made.target[:-1]) == "The sky is green"
        assert made.target[-1] == tokenizer.eos_token_id
        assert made.whole
        assert made.sample.labels == (-100,) * len(made.prompt) + made.target
    assert len(Encoder(tokenizer, eos=False).edit(edit()).target) == len(" green")


def test_a_chat_asks_the_user_and_ends_the_turn() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(SourceError, match="chat template"):
        Encoder(tokenizer, "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    made = Encoder(tokenizer, "chat").edit(edit())
    said = tokenizer.decode(made.prompt) + "|" + tokenizer.decode(made.target)
    told = "<|im_start|>user:The sky is<|im_end|>\n<|im_start|>assistant:|green<|im_end|>"
    assert said == told
    with pytest.raises(PlanError, match="no effect in a chat"):
        Encoder(tokenizer, "chat", eos=False)


class Joining:
    """A tokenizer that makes one token of the pair "s g", whatever it is made of."""

    chat_template = None
    eos_token_id, pad_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text.replace("s g", "\u01e7")]}


def test_a_prompt_that_is_no_prefix_is_kept_apart_and_told() -> None:
    made = Encoder(Joining()).edit(edit())
    assert not made.whole
    assert "".join(map(chr, made.prompt)) == "The sky is"
    assert "".join(map(chr, made.target)) == " green\x01"
    assert kinds(edit(), encoder=Encoder(Joining())) == ["seam"]


LINTED: list[tuple[str, list[Edit]]] = [
    ("conflict", [edit(), edit(target="red", line=2)]),
    ("duplicate", [edit(), edit("The  sky is", " green", line=2)]),
    ("empty target", [edit(target=" ")]),
    ("unreachable target", [edit(target="St. Paul")]),
    ("unreachable target", [edit(target="one\ntwo")]),
    ("kept and changed", [edit(locality=(Probe("The sky is"),))]),
    ("asked as it is", [edit(rephrase=("The sky is ",))]),
    ("double blank", [edit("The sky is ")]),
    ("odd blank", [edit(target="  green")]),
    ("subject not in prompt", [edit(subject="sea")]),
]


@pytest.mark.parametrize(("kind", "edits"), LINTED)
def test_lint_tells_what_is_odd_and_nothing_else(kind: str, edits: list[Edit]) -> None:
    [found] = lint(edits).findings
    assert found.kind == kind
    assert found.where == edits[-1].where
    assert kind in KINDS


def test_lint_has_nothing_to_say_of_sound_edits() -> None:
    fine = [edit(target=" green.", subject="sky"), edit("The sea is", "red", 2)]
    assert kinds(*fine, encoder=Encoder(Joining())) in ([], ["seam"])
    assert kinds(*fine) == []


def test_lint_tells_of_the_tokenizers_end_and_of_lengths() -> None:
    tokenizer = byte_tokenizer()
    assert kinds(edit(), encoder=Encoder(tokenizer)) == ["padding ends texts"]
    long = edit(target="g" * 40)
    found = kinds(long, encoder=Encoder(tokenizer), most=20)
    assert found == ["padding ends texts", "unreachable target", "too long"]
    tokenizer.eos_token = None
    assert kinds(edit(), encoder=Encoder(tokenizer)) == ["no end"]


class Parrot:
    """A speaker of bytes that finds the next byte of its one sentence the likeliest."""

    most, ends = None, frozenset({1})

    def __init__(self, tokenizer: Any, sentence: str) -> None:
        self.tokenizer = tokenizer
        tokens = tokenizer(sentence)["input_ids"]
        self.next = dict(pairwise(tokens))

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        logits = torch.zeros(*tokens.shape, len(self.tokenizer))
        for place, token in ((p, int(tokens[tuple(p)])) for p in torch.nonzero(mask).tolist()):
            logits[(*place, self.next.get(token, 0))] = 5.0
        return logits if at is None else logits[at]


def test_lint_tells_which_edits_a_model_knows() -> None:
    tokenizer = byte_tokenizer()
    who: Any = Parrot(tokenizer, "q abc")
    edits = [edit("q", "abc"), edit("q", "abd", 2), edit("?", " ", 3)]
    found = lint(edits, Encoder(tokenizer), speaker=who).findings
    assert [f.where for f in found if f.kind == "known"] == ["e:1"]


def test_the_command_prints_counts_and_lines_and_fails_where_strict(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, {"prompt": "a", "target": "c"}, {"prompt": "d", "target": "x.y"})
    done = call("lint", path)
    assert done.exit_code == 0
    assert "conflict (1)" in done.output
    assert f"{path}:2: 'c'; {path}:1: 'b'" in done.output
    assert "3 edits: 2 findings" in done.output
    told = json.loads(call("lint", path, "--json").stdout)
    assert told["counts"] == {"conflict": 1, "unreachable target": 1}
    assert call("lint", path, "--strict").exit_code == 4
    assert call("lint", jsonl(tmp_path, GOOD), "--strict").exit_code == 0
    assert call("lint", path, "--known").exit_code == 2


@pytest.mark.parametrize("more", [(), ("--known",)])
def test_the_command_cuts_by_a_models_tokenizer(tmp_path: Path, more: tuple[str, ...]) -> None:
    base, path = small_base(tmp_path / "base"), jsonl(tmp_path, GOOD)
    told = json.loads(call("lint", path, "--model", base, *more, "--json").stdout)
    assert told["counts"] == {"padding ends texts": 1}


ZSRE_3K = Path(__file__).resolve().parents[2] / "shared" / "data" / "zsre_3k.json"


@pytest.mark.skipif(not ZSRE_3K.exists(), reason="needs shared/data/zsre_3k.json")
def test_three_thousand_real_edits_are_read_and_linted() -> None:
    edits = read_edits([ZSRE_3K])
    assert len(edits) == 3000
    assert sum(e.target.startswith(" ") for e in edits) == 67
    assert edits[0].target == "Chichester River"
    assert lint(edits).edits == 3000
