"""Rows rebuilt in the model's own words, where a judge finds these right."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.data.judges import judge_of
from mergekit_ft.data.rebuilding import PARAPHRASE, rebuild
from mergekit_ft.data.rows import Row, read_rows
from mergekit_ft.errors import PlanError, SourceError
from tests.small_models import cli
from tests.tuned import rows, small_base


class Scripted:
    """A speaker that says what it is told to say after a prompt."""

    def __init__(self, script: Mapping[str, str]) -> None:
        self.tokenizer, self.script = byte_tokenizer(), script
        self.ends = frozenset({self.tokenizer.eos_token_id})
        self.most: int | None = None

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        raise AssertionError("is asked for answers alone")

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        prompts = [
            self.tokenizer.decode(row[there])
            for row, there in zip(tokens, mask.bool(), strict=True)
        ]
        left = [
            [*self.tokenizer(self._said(p), add_special_tokens=False)["input_ids"], *self.ends]
            for p in prompts
        ]
        return self._next(left)

    def step(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        return self._next([row[1:] for row in state])

    def keep(self, state: Any, rows: Tensor) -> Any:
        return [state[i] for i in rows.tolist()]

    def _said(self, prompt: str) -> str:
        return next(said for words, said in self.script.items() if prompt == words)

    def _next(self, left: list[list[int]]) -> tuple[Tensor, Any]:
        logits = torch.zeros(len(left), len(self.tokenizer))
        for i, row in enumerate(left):
            logits[i, row[0]] = 1.0
        return logits, left


ROWS = [
    {"prompt": "1+1", "completion": " It is 2", "weight": 2.0},
    {"prompt": "2+2", "completion": " It is 4"},
    {"prompt": "3+3", "completion": " It is 6"},
]


def script() -> dict[str, str]:
    def again(i: int) -> str:
        return PARAPHRASE.format(prompt=ROWS[i]["prompt"], completion=ROWS[i]["completion"])

    return {
        "1+1": "\nit makes 2",  # right
        "2+2": " it makes 5",  # wrong, but it can say it again
        again(1): " four, that is 4",
        "3+3": " seven",  # wrong, twice
        again(2): " 7",
    }


def test_own_words_where_right_then_a_paraphrase_then_the_answer_given(tmp_path: Path) -> None:
    made = rebuild(Scripted(script()), [rows(tmp_path, ROWS)], judge_of(r"regex:(\d+)"), rows="raw")
    found = [json.loads(line) for line in made.lines]
    assert found == [
        {"prompt": "1+1", "completion": " it makes 2", "weight": 2.0},
        {"prompt": "2+2", "completion": " four, that is 4"},
        ROWS[2],
    ]
    assert made.sources == ["own", "paraphrase", "gold"]
    assert made.report() | {} == {
        "rows": 3, "own": 1, "paraphrase": 1, "gold": 1,
        "own_share": 1 / 3, "paraphrase_share": 1 / 3, "gold_share": 1 / 3,
    }  # fmt: skip
    assert made.tried[1]["own"] == {"answer": "it makes 5", "ended": "token", "right": False}


def test_without_paraphrases_they_are_not_asked_for(tmp_path: Path) -> None:
    words = {key: said for key, said in script().items() if len(key) == 3}
    made = rebuild(
        Scripted(words),
        [rows(tmp_path, ROWS)],
        judge_of(r"regex:(\d+)"),
        rows="raw",
        paraphrase=None,
    )
    assert made.sources == ["own", "gold", "gold"]


def test_an_answer_that_was_cut_is_not_right(tmp_path: Path) -> None:
    made = rebuild(
        Scripted({"a": "yes and on and on"}),
        [rows(tmp_path, [{"prompt": "a", "completion": "yes"}])],
        judge_of("regex:yes"),
        rows="raw",
        paraphrase=None,
        max_new_tokens=5,
    )
    assert made.sources == ["gold"]
    assert made.tried[0]["own"]["ended"] == "length"


def row(prompt: str, completion: str) -> Row:
    return Row("rows.jsonl:7", "completion", {"prompt": prompt, "completion": completion}, 1.0)


def test_judges_by_text() -> None:
    assert judge_of("exact")(" 4 ", row("", "4"))
    assert not judge_of("exact")("Four", row("", "four"))
    assert judge_of("normalised")("The four.", row("", "four"))
    last = judge_of("regex:#### (-?[0-9]+)")
    assert last("so 3 #### 3 no, #### 4", row("", "2 + 2 #### 4"))
    assert not last("4", row("", "#### 4"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:7: .*finds nothing in its completion"):
        last("#### 4", row("", "4"))


def test_judges_that_are_none_are_refused_by_name() -> None:
    for words, said in (
        ("exakt", "did you mean 'exact'"),
        ("regex", "judge 'regex' is none"),
        ("regex:(", "is no pattern"),
        ("regex:(a)(b)", "has 2 groups"),
        ("python:no_such_module:f", "is not there"),
        ("python:json:no_such", "is not there"),
    ):
        with pytest.raises(PlanError, match=said):
            judge_of(words)


def test_a_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_judge.py").write_text(
        "def fits(prompt, answer, completion): return answer == prompt + completion\n"
        "def breaks(prompt, answer, completion): return 1 / 0\n"
        "def says_two(prompt, answer, completion): return 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert judge_of("python:own_judge:fits")("ab", row("a", "b"))
    assert not judge_of("python:own_judge:fits")("b", row("a", "b"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:7: .*ZeroDivisionError"):
        judge_of("python:own_judge:breaks")("b", row("a", "b"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:7: .*gave 2; it must say True or False"):
        judge_of("python:own_judge:says_two")("b", row("a", "b"))


def test_a_command_judges_and_its_failures_are_told_with_the_row(tmp_path: Path) -> None:
    script = tmp_path / "judge.py"
    script.write_text(
        "import json, sys, time\n"
        "given = json.load(sys.stdin)\n"
        "if given['answer'] == 'wait': time.sleep(30)\n"
        "if given['answer'] == 'odd': sys.exit('cannot say')\n"
        "if given['answer'] == 'worse': print('no key', file=sys.stderr); sys.exit(3)\n"
        "sys.exit(0 if given['answer'] == given['completion'] else 1)\n"
    )
    judge = judge_of(f"command:{sys.executable} {script}", seconds=10)
    assert judge("b", row("a", "b"))
    assert not judge("c", row("a", "b"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:7: .*exit code 1 .*cannot say"):
        judge("odd", row("a", "b"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:7: .*exit code 3 .*no key"):
        judge("worse", row("a", "b"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:7: .*took more than 0.5 seconds"):
        judge_of(f"command:{sys.executable} {script}", seconds=0.5)("wait", row("a", "b"))
    with pytest.raises(PlanError, match="cannot be run"):
        judge_of("command:/no/such/judge")("b", row("a", "b"))


def test_a_prompt_of_the_wrong_words_and_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    speaker, judge = Scripted({}), judge_of("exact")
    with pytest.raises(PlanError, match=r"paraphrase: has no \{completion\}"):
        rebuild(speaker, [rows(tmp_path, ROWS)], judge, paraphrase="Say {prompt} again")
    texts = rows(tmp_path, [{"text": "a"}], "texts.jsonl")
    with pytest.raises(SourceError, match=r"texts\.jsonl:1: keys text"):
        rebuild(speaker, [texts], judge)
    speaker.most = 10
    with pytest.raises(SourceError, match=r"rows\.jsonl:1: a prompt of 3 tokens and an answer"):
        rebuild(speaker, [tmp_path / "rows.jsonl"], judge, rows="raw")


def test_the_command_rebuilds_and_tells_the_shares(tmp_path: Path) -> None:
    base, file = small_base(tmp_path / "base"), rows(tmp_path, ROWS)
    out, tried = tmp_path / "out.jsonl", tmp_path / "tried.jsonl"
    words = ("data", "rebuild", str(base), str(file), str(out), "--rows", "raw")
    more = ("--judge", "exact", "--max-new-tokens", "4", "--tried", str(tried))
    done = cli(*words, *more)
    assert done.exit_code == 0, done.output
    assert "of 3 rows 0 are answered in the model's own words" in done.stdout
    assert [r.words for r in read_rows([out])] == ROWS
    assert len(tried.read_text().splitlines()) == 3
    failed = cli(*words, "--judge", "command:/no/such/judge", "--overwrite")
    assert failed.exit_code != 0
    assert [r.words for r in read_rows([out])] == ROWS  # as it was
