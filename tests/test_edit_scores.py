"""How edits fare: figures by hand from scripted speakers, and by models of two folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft import cli
from mergekit_ft.data.rows import Row
from mergekit_ft.editing.facts import Edit, Probe
from mergekit_ft.editing.scores import Scores, require_changed, scores
from mergekit_ft.errors import OperatorError, SourceError
from tests.tuned import small_base

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
V = len(TOKENIZER)
TEXT = [Row("text: 1", "text", {"text": "hmmm"}, 1.0)]


class Scripted:
    """A speaker of a script: after a prompt its reply, whatever was said of it so far.

    Elsewhere the logit of "m" is `tilt` and every other one 0.
    """

    def __init__(self, script: Mapping[str, str], tilt: float = 0.0, size: int = V) -> None:
        self.tokenizer, self.most, self.ends = TOKENIZER, None, frozenset({END})
        self.tilt, self.size = tilt, size
        self.lines = [
            (tokens(prompt), [*tokens(prompt), *tokens(reply), END])
            for prompt, reply in script.items()
        ]

    def next(self, row: list[int]) -> Tensor:
        logits = torch.zeros(self.size)
        for prompt, line in self.lines:
            if row[: len(prompt)] == prompt and len(row) < len(line):
                logits[line[len(row)]] = 9.0
                return logits
        logits[tokens("m")[0]] = self.tilt
        return logits

    def read(self, given: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        logits = torch.zeros(*given.shape, self.size)
        for i, row in enumerate(given.tolist()):
            for j in range(len(row)):
                logits[i, j] = self.next(row[: j + 1])
        return logits if at is None else logits[at]

    def begin(self, given: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        rows = [row[len(row) - int(m.sum()) :] for row, m in zip(given.tolist(), mask, strict=True)]
        return torch.stack([self.next(row) for row in rows]), rows

    def step(self, state: Any, given: Tensor) -> tuple[Tensor, Any]:
        rows = [[*row, token] for row, token in zip(state, given.tolist(), strict=True)]
        return torch.stack([self.next(row) for row in rows]), rows

    def keep(self, state: Any, rows: Tensor) -> Any:
        return [state[i] for i in rows.tolist()]


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


EDIT = Edit(
    "e:1", "Ink is", "milk", None, ("So ink is", "And ink is"), (Probe("Tar is", ("black",)),),
    (Probe("Cows give", ("ink", "Ink juice")),),
)  # fmt: skip
OTHER = Edit("e:2", "Tea is", "a stone", locality=(Probe("Milk is"),))
BEFORE = {
    "Ink is": " dye", "So ink is": " dye", "And ink is": " dye", "Tar is": " black",
    "Cows give": " milk", "Tea is": " hot", "Milk is": " ab",
}  # fmt: skip
AFTER = {
    "Ink is": " Milk. It is", "So ink is": " the milk!", "And ink is": " mild", "Tar is": " black",
    "Cows give": " INK juice\nand", "Tea is": " stone", "Milk is": " aa",
}  # fmt: skip


def found(**more: Any) -> Scores:
    first, last = Scripted(BEFORE), Scripted(AFTER, tilt=math.log(11))
    return scores(first, last, [EDIT, OTHER], neutral=TEXT, **more)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_answers_are_judged_where_decoding_ends_and_normalised(batch: int) -> None:
    told = found(batch=batch)
    after = {name: figure.value for name, figure in told.after.items()}
    before = {name: figure.value for name, figure in told.before.items()}
    assert after["reliability"] == 1.0  # "Milk" before the stop; "stone" without its article
    assert after["generalization"] == 0.5
    assert after["portability"] == 1.0  # the second of two right answers
    assert after["locality"] == 0.5
    assert after["locality_right"] == 1.0
    assert before["reliability"] == before["generalization"] == before["portability"] == 0.0
    assert before["locality"] == before["locality_tokens"] == 1.0
    assert told.asked == {"reliability": 2, "generalization": 2, "portability": 1, "locality": 2}
    assert not told.unchanged


def test_teacher_forced_figures_count_tokens_and_ends() -> None:
    after = {name: figure.value for name, figure in found().after.items()}
    # " milk" + end: " Milk." is wrong in M and at the end; " a stone" + end: of " stone" + end
    # after each true token of " a stone": " " alone is where it should be
    assert after["reliability_forced"] == (4 + 1) / (6 + 9)
    assert after["reliability_forced_whole"] == 0.0
    # " milk" + end of " the milk!": " "; of " mild" + end: all but d
    assert after["generalization_forced"] == (1 + 5) / 12
    # " black" + end as before: all 7; " ab" + end, of " aa" + end: all but b
    assert after["locality_tokens"] == (7 + 3) / (7 + 4)


def test_perplexity_and_divergence_are_those_of_the_definition() -> None:
    told = found()
    # of "hmmm" three tokens "m" are scored: uniform before; after, m has 11 / (V + 10)
    assert told.before["perplexity"].value == pytest.approx(V, rel=1e-5)
    assert told.after["perplexity"].value == pytest.approx((V + 10) / 11, rel=1e-5)
    kl = math.log((V + 10) / V) - math.log(11) / V
    assert told.after["divergence"].value == pytest.approx(kl, rel=1e-4)
    assert told.before["divergence"].value == 0.0


def test_an_edit_that_changed_nothing_is_refused() -> None:
    same = scores(Scripted(BEFORE), Scripted(BEFORE), [EDIT], neutral=TEXT)
    with pytest.raises(OperatorError, match="changed nothing"):
        require_changed(same)
    require_changed(found())


def test_the_first_model_is_closed_before_the_second_is_opened() -> None:
    opened: list[str] = []

    def opening(name: str, script: Mapping[str, str]) -> Any:
        def opener() -> Any:
            opened.append(name)
            return Scripted(script)

        return opener

    told = scores(opening("a", BEFORE), opening("b", AFTER), [EDIT], neutral=TEXT)
    assert opened == ["a", "b"]
    assert told.after["reliability"].value == 1.0


def test_other_vocabularies_and_no_edits_are_refused() -> None:
    with pytest.raises(OperatorError, match="vocabularies"):
        scores(Scripted(BEFORE), Scripted(AFTER, size=V + 1), [EDIT], neutral=TEXT)
    with pytest.raises(SourceError, match="no edits"):
        scores(Scripted(BEFORE), Scripted(AFTER), [])
    short = [Row("text: 1", "text", {"text": "h"}, 1.0)]
    with pytest.raises(SourceError, match="too short"):
        scores(Scripted(BEFORE), Scripted(AFTER), [EDIT], neutral=short)
    narrow: Any = Scripted(BEFORE)
    narrow.most = 20
    with pytest.raises(SourceError, match="do not fit"):
        scores(narrow, Scripted(AFTER), [EDIT], neutral=TEXT)


def test_what_is_not_asked_has_no_figure() -> None:
    told = scores(Scripted(BEFORE), Scripted(AFTER), [Edit("e:1", "Ink is", "milk")], neutral=[])
    assert set(told.after) == {"reliability", "reliability_forced", "reliability_forced_whole"}


def call(*words: Any) -> Result:
    return CliRunner().invoke(cli.main, ["edits", "score", *map(str, words)])


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, other = small_base(tmp_path / "base"), small_base(tmp_path / "other")
    held = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    held[name] = held[name] + torch.linspace(-1, 1, held[name].numel()).view_as(held[name])
    save_file(held, other / "model.safetensors", {"format": "pt"})
    path = tmp_path / "edits.jsonl"
    row = {"prompt": "Ink is", "target": "milk", "locality": ["Tar is"]}
    path.write_text(json.dumps(row) + "\n")
    return base, other, path


def test_the_command_asks_two_models_and_writes_all_it_found(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = [tmp_path / name for name in ("page.html", "chart.png", "answers.jsonl")]
    files = [word for pair in zip(("--report", "--plot", "--answers"), out, strict=True)
             for word in pair]  # fmt: skip
    done = call(*models, *files, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["before"]["locality"]["value"] == 1.0
    assert told["after"]["divergence"]["value"] > 0
    assert "greedy decoding" in told["protocol"]
    assert "Ink is" in out[0].read_text()
    assert out[1].read_bytes().startswith(b"\x89PNG")
    assert len(out[2].read_text().splitlines()) == 2
    shown = call(*models)
    assert "reliability" in shown.stdout
    assert "1 edit, asked 1 of reliability" in shown.stdout


def test_the_command_fails_where_nothing_changed_and_writes_nothing(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, path = models
    done = call(base, base, path, "--answers", tmp_path / "answers.jsonl")
    assert done.exit_code == OperatorError("").exit_code
    assert "changed nothing" in done.stderr
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_damaged_model_is_refused(models: tuple[Path, Path, Path]) -> None:
    base, other, path = models
    held = load_file(other / "model.safetensors")
    held["model.norm.weight"][0] = math.nan
    save_file(held, other / "model.safetensors", {"format": "pt"})
    done = call(base, other, path)
    assert done.exit_code == OperatorError("").exit_code
    assert "model.norm.weight holds nan" in done.stderr
