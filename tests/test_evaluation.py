"""Models measured on rows: against transformers, numbers worked by hand, and hostile input."""

from __future__ import annotations

import gc
import json
import math
import sys
import weakref
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.data.matching import normalised
from mergekit_ft.data.rows import Encoder, read_rows
from mergekit_ft.errors import MergekitError, OperatorError, PlanError, SourceError
from mergekit_ft.evaluation import evaluate, kept, scoring
from mergekit_ft.evaluation.measures import mean, ratio
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.resolution.opening import reference_of
from tests.small_models import cli
from tests.tuned import ROWS, rows, small_base

RAGGED = [
    {"prompt": "a" * (3 * i % 11 + 1), "completion": "bc" * (i % 5 + 1), "weight": 1.0 + i % 3}
    for i in range(17)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("model") / "base")


def speaker(folder: Path) -> ModelSpeaker:
    return open_speaker(reference_of(str(folder)))


class Bigrams:
    """Says next tokens by the last one alone: a table of logits, zero where nothing is set."""

    most = None
    name = "bigrams"

    def __init__(self, **odds: float) -> None:
        self.tokenizer = byte_tokenizer()
        self.end = int(self.tokenizer.eos_token_id)
        self.ends = frozenset([self.end])
        self.size = len(self.tokenizer)
        self.table = torch.zeros(self.size, self.size)
        for pair, odd in odds.items():  # "ab": the odds of b after a, against 1 of each other
            self.table[self.id(pair[0]), self.id(pair[1])] = math.log(odd)

    def id(self, letter: str) -> int:
        if letter == "_":
            return self.end
        (found,) = self.tokenizer(letter, add_special_tokens=False)["input_ids"]
        return int(found)

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        assert at is not None
        return self.table[tokens][at]

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        return self.table[tokens[:, -1]], None

    def step(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table[tokens], None

    def keep(self, state: Any, rows: Tensor) -> Any:
        return None


# ---- against transformers


@torch.no_grad()
def test_loss_and_token_accuracy_are_those_of_transformers(base: Path, tmp_path: Path) -> None:
    file = rows(tmp_path)
    found = evaluate([str(base)], [file], rows="raw")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    samples = Encoder(AutoTokenizer.from_pretrained(base), "raw", 999).samples(read_rows([file]))
    nats, right, count = 0.0, 0, 0
    for sample in samples:
        tokens, labels = torch.tensor([sample.tokens]), torch.tensor([sample.labels])
        said = model(tokens, labels=labels)  # the loss that transformers computes of labels
        scored = int((labels[:, 1:] != -100).sum())
        nats, count = nats + float(said.loss) * scored, count + scored
        right += int((said.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
    (result,) = found.results
    assert result.scored_tokens == count
    assert result.figures["loss"].value == pytest.approx(nats / count, abs=1e-6)
    assert result.figures["perplexity"].value == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert result.figures["token_accuracy"].value == right / count


def test_answers_are_those_of_generate(base: Path, tmp_path: Path) -> None:
    file = rows(tmp_path, ROWS[::5])
    found = evaluate([str(base)], [file], rows="raw", batch=3, answers=True)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    most = found.results[0].max_new_tokens
    right = 0
    for row, told in zip(ROWS[::5], found.answers, strict=True):
        tokens = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        said = model.generate(tokens, do_sample=False, max_new_tokens=most, pad_token_id=0)
        text = tokenizer.decode(said[0, tokens.shape[1] :], skip_special_tokens=True)
        assert told["answer"] == text
        assert told["exact_match"] == (text.strip() == row["completion"].strip())
        right += told["exact_match"]
    assert found.results[0].figures["exact_match"].value == right / len(found.answers)


def test_no_figure_depends_on_the_batch(base: Path, tmp_path: Path) -> None:
    files = [rows(tmp_path, RAGGED)]
    choices = [
        {"prompt": "x" * (i % 7 + 1), "choices": ["ab", "c", "d" * (i % 4 + 2)], "answer": i % 3}
        for i in range(11)
    ]
    files.append(rows(tmp_path, choices, "choices.jsonl"))
    one, seven = (evaluate([str(base)], files, rows="raw", batch=batch) for batch in (1, 7))
    for mine, theirs in zip(one.results, seven.results, strict=True):
        assert mine.figures.keys() == theirs.figures.keys()
        for name, figure in mine.figures.items():
            assert figure.value == pytest.approx(theirs.figures[name].value, rel=1e-5), name
            assert figure.stderr == pytest.approx(theirs.figures[name].stderr, rel=1e-4), name


def test_a_base_with_a_delta_measures_as_the_model_that_it_makes(
    base: Path, tmp_path: Path
) -> None:
    tuned: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "tuned")
    made = cli(
        "delta",
        "extract",
        str(base),
        str(tmp_path / "tuned"),
        str(tmp_path / "d.delta.safetensors"),
    )
    assert made.exit_code == 0, made.output
    named = f"{{model: {base}, delta: {tmp_path / 'd.delta.safetensors'}}}"
    models = [str(base), str(tmp_path / "tuned"), named]
    found = evaluate(models, [rows(tmp_path)], measures=["loss"], rows="raw")
    plain, whole, patched = (r.figures["loss"].value for r in found.results)
    assert whole == patched != plain


def test_a_merge_plan_measures_as_the_model_that_it_would_write(base: Path, tmp_path: Path) -> None:
    other: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.mul_(3.0)
    other.save_pretrained(tmp_path / "other")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {base}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {tmp_path / 'other'}, parameters: {{weight: 1}}}}\n"
    )
    assert cli("merge", str(plan), str(tmp_path / "out")).exit_code == 0
    models = [str(plan), str(tmp_path / "out"), str(base)]
    found = evaluate(models, [rows(tmp_path)], measures=["loss"], rows="raw")
    planned, written, plain = (r.figures["loss"].value for r in found.results)
    assert planned == written != plain
    plan.write_text(plan.read_text().replace("linear", "liner"))
    refused(PlanError, "did you mean 'linear'", str(plan), data=[rows(tmp_path)])


def test_half_the_bits_move_figures_a_little(base: Path, tmp_path: Path) -> None:
    file = rows(tmp_path, RAGGED)
    full, half = (
        evaluate(str(base), [file], measures=["loss"], rows="raw", precision=precision)
        .results[0]
        .figures["loss"]
        .value
        for precision in ("float32", "bfloat16")
    )
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


# ---- by hand


def test_loss_and_token_accuracy_by_hand(tmp_path: Path) -> None:
    who = Bigrams(ab=9, bc=2)
    file = rows(tmp_path, [{"prompt": "a", "completion": "bc"}, {"prompt": "b", "completion": "a"}])
    found = evaluate([who], [file], measures=["loss", "token_accuracy"], rows="raw")
    size = who.size
    first = [9 / (size + 8), 2 / (size + 1), 1 / size]  # b after a, c after b, the end after c
    second = [1 / (size + 1), 1 / (size + 8)]  # a after b, the end after a
    (result,) = found.results
    nats = -sum(map(math.log, [*first, *second]))
    assert result.figures["loss"].value == pytest.approx(nats / 5, abs=1e-6)
    assert result.figures["token_accuracy"].value == 2 / 5  # the likeliest after c is token 0


def test_weights_weigh_rows(tmp_path: Path) -> None:
    who = Bigrams(ab=9)
    line = {"prompt": "a", "completion": "b"}
    other = {"prompt": "c", "completion": "ddd"}
    twice = rows(tmp_path, [line, line, other], "twice.jsonl")
    weighted = rows(tmp_path, [line | {"weight": 2}, other], "weighted.jsonl")
    found = evaluate([who], [twice, weighted], rows="raw")
    one, two = (r.figures for r in found.results)
    assert {k: f.value for k, f in one.items()} == pytest.approx(
        {k: f.value for k, f in two.items()}
    )


def test_choices_by_hand_summed_and_per_token(tmp_path: Path) -> None:
    who = Bigrams(ab=9, ac=20, cd=100)
    file = rows(tmp_path, [{"prompt": "a", "choices": ["b", "cd"], "answer": "cd"}])
    found = evaluate([who], [file], rows="raw", answers=True)
    b = math.log(9 / (who.size + 8 + 19))
    cd = math.log(20 / (who.size + 8 + 19)) + math.log(100 / (who.size + 99))
    assert b > cd  # summed the first is likelier,
    assert cd / 2 > b  # a token the second
    (told,) = found.answers
    assert told["log_probabilities"] == pytest.approx([b, cd], abs=1e-5)
    assert told["tokens"] == [1, 2]  # what ends an answer is not scored
    assert (told["answer"], told["answer_per_token"], told["expected"]) == ("b", "cd", "cd")
    figures = found.results[0].figures
    assert figures["choice_accuracy"].value == 0
    assert figures["choice_accuracy_per_token"].value == 1


def test_a_pair_is_a_choice_between_what_was_chosen_and_rejected(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "c", "rejected": "b"},
    ]
    found = evaluate([Bigrams(ab=9)], [rows(tmp_path, pairs)], rows="raw")
    assert found.results[0].figures["choice_accuracy"].value == 0.5


def test_exact_match_as_it_is_and_normalised(tmp_path: Path) -> None:
    # After q it says "The Xy!" and stops.
    says = Bigrams(**{"qT": 9, "Th": 9, "he": 9, "e ": 9, " X": 9, "Xy": 9, "y!": 9, "!_": 9})
    asked = [
        {"prompt": "q", "completion": "The Xy!"},
        {"prompt": "q", "completion": " The Xy! "},
        {"prompt": "q", "completion": "the xy"},
        {"prompt": "q", "completion": "xyz"},
    ]
    measures = ["exact_match", "exact_match_normalised"]
    found = evaluate([says], [rows(tmp_path, asked)], measures=measures, rows="raw", answers=True)
    assert [a["exact_match"] for a in found.answers] == [True, True, False, False]
    assert [a["exact_match_normalised"] for a in found.answers] == [True, True, True, False]
    assert {a["ended"] for a in found.answers} == {"token"}
    figures = found.results[0].figures
    assert figures["exact_match"].value == 0.5
    assert figures["exact_match_normalised"].value == 0.75


def test_what_the_assistant_says_last_is_asked_of_messages(tmp_path: Path) -> None:
    who = Bigrams(**{"\nz": 9, "z_": 9})  # after a turn's head it says z
    who.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "z"},
    ]
    found = evaluate([who], [rows(tmp_path, [{"messages": talk}])], answers=True)
    (told,) = found.answers
    assert told["prompt"] == talk[:3]
    assert (told["answer"], told["exact_match"]) == ("z", True)
    assert found.results[0].rendered == "chat"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a cat, an ape and the dog.", "cat ape and dog"),
        (" Another theatre\n", "another theatre"),
        ("THE THE", ""),
    ],
)
def test_texts_are_normalised_as_squad_does(text: str, wanted: str) -> None:
    assert normalised(text) == wanted


def test_standard_errors_are_those_of_the_mean_and_of_the_jackknife() -> None:
    dice = np.random.default_rng(0)
    values = dice.normal(size=50)
    figure = mean(values.tolist(), [1.0] * 50)
    assert figure.value == pytest.approx(values.mean())
    assert figure.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    above, below = dice.uniform(1, 2, 400), dice.uniform(5, 9, 400)
    found = ratio(above.tolist(), below.tolist(), [1.0] * 400)
    left_out = (above.sum() - above) / (below.sum() - below)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.stderr == pytest.approx(jackknife, rel=0.01)
    assert mean([1.0], [1.0]).stderr is None


def test_a_chain_by_hand() -> None:
    figures = [[0.1, 0.2, 0.3], [0.8, 0.3, 0.2], [0.9, 0.7, 0.4], [0.6, 0.5, 0.9]]
    found = kept(figures)
    assert found.before == (0.1, 0.2, 0.3)
    assert found.average == pytest.approx((0.6 + 0.5 + 0.9) / 3)
    assert found.backward == pytest.approx(((0.6 - 0.8) + (0.5 - 0.7)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.7 - 0.5)) / 2)
    assert found.forward == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)
    assert kept(figures[1:]).forward is None
    losses = kept([[1.0, 3.0], [1.5, 2.0]], lower=True)  # task 1 was 1.0 and is 1.5
    assert (losses.average, losses.backward, losses.forgetting) == (1.75, -0.5, 0.5)


# ---- what is refused


def refused(kind: type[MergekitError], said: str, *models: Any, data: Any, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        evaluate(list(models), data, **options)
    assert said in str(caught.value)


def test_rows_that_are_none_are_refused_with_their_lines(tmp_path: Path) -> None:
    empty = rows(tmp_path, [], "empty.jsonl")
    refused(SourceError, "empty.jsonl: no rows", Bigrams(), data=[empty])
    bad = tmp_path / "bad.jsonl"
    lines = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a"},
        {"prompt": "a", "complation": "b"},
        {"prompt": "a", "choices": ["b", "c"]},
        {"prompt": "a", "choices": ["b", "c"], "answer": 2},
        {"prompt": "a", "choices": ["b", "c"], "answer": "d"},
        {"prompt": "a", "choices": ["b", "b"], "answer": 0},
        {"prompt": 5, "choices": ["b", "c"], "answer": 0},
    ]
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"prompt": "a", "comp')
    with pytest.raises(SourceError) as caught:
        evaluate([Bigrams()], [bad])
    told = str(caught.value).splitlines()
    assert [int(line.split(":")[1]) for line in told] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert "'completion'" in told[1]
    assert "0 to 1; got 2" in told[3]
    assert "prompt must be text" in told[6]


def test_measures_that_rows_do_not_allow_are_refused_by_name(tmp_path: Path) -> None:
    text = rows(tmp_path, [{"text": "abc"}], "text.jsonl")
    answers = rows(tmp_path, [{"prompt": "a", "completion": "b"}], "answers.jsonl")
    choose = rows(tmp_path, [{"prompt": "a", "choices": ["b", "c"], "answer": 1}], "choose.jsonl")
    who = Bigrams()
    refused(PlanError, "exact_match needs rows of", who, data=[text], measures=["exact_match"])
    refused(PlanError, "choice_accuracy needs", who, data=[answers], measures=["choice_accuracy"])
    refused(PlanError, "did you mean 'loss'", who, data=[text], measures=["los"])
    said = "choose.jsonl: none of loss can be measured"
    refused(PlanError, said, who, data=[text, choose], measures=["loss"])
    both = evaluate([who], [text, answers], measures=["loss", "exact_match"], rows="raw")
    assert [list(r.figures) for r in both.results] == [["loss"], ["loss", "exact_match"]]


def test_what_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    text = rows(tmp_path, [{"text": "abc"}], "text.jsonl")
    choose = rows(tmp_path, [{"prompt": "a", "choices": ["b", "c"], "answer": 1}], "choose.jsonl")
    who = Bigrams()
    refused(PlanError, "stop are about answers", who, data=[text], stop=["."])
    refused(PlanError, "stop are about answers", who, data=[text], max_new_tokens=4)
    refused(PlanError, "max_length cuts", who, data=[choose], max_length=4)
    refused(PlanError, "rows with a prompt", who, data=[text], rows="raw")
    refused(PlanError, "nothing is answered", who, data=[text], answers=True)
    refused(PlanError, "no data", who, data=[])
    refused(PlanError, "no model", data=[text])
    refused(PlanError, "ModelSpeaker(model", torch.nn.Linear(1, 1), data=[text])
    refused(PlanError, "named twice", who, who, data=[text])
    refused(PlanError, "batch 0", who, data=[text], batch=0)
    refused(PlanError, "both be the task 'text'", who, data=[text, tmp_path / "x/text.jsonl"])
    refused(PlanError, "a chain has two tasks", who, data=[text], chain=True)
    refused(PlanError, "precision is", who, data=[text], precision="int4")
    zero = rows(tmp_path, [{"text": "abc", "weight": 0}], "zero.jsonl")
    refused(SourceError, "weight 0", who, data=[zero])


def test_rows_longer_than_the_model_are_refused_or_cut_when_asked(
    base: Path, tmp_path: Path
) -> None:
    who = speaker(base)
    who.most = 40
    long = rows(tmp_path, [{"text": "ab"}, {"text": "b" * 99}], "long.jsonl")
    refused(SourceError, "long.jsonl:2: 100 tokens do not fit", who, data=[long])
    found = evaluate([who], [long], max_length=40)
    assert found.results[0].scored_tokens == 2 + 39
    assert any("1 rows were cut" in note for note in found.notes)
    prompt = rows(tmp_path, [{"prompt": "b" * 20, "completion": "c"}], "prompt.jsonl")
    said = "prompt.jsonl:1: its prompt of 20 tokens and an answer of 32 do not fit"
    refused(SourceError, said, who, data=[prompt], rows="raw")
    choose = [{"prompt": "b" * 40, "choices": ["c", "dd"], "answer": 0}]
    said = "choose.jsonl:1: a choice after its prompt has 42 tokens"
    refused(SourceError, said, who, data=[rows(tmp_path, choose, "choose.jsonl")], rows="raw")


def test_an_answer_that_could_never_match_is_refused(tmp_path: Path) -> None:
    file = rows(tmp_path, [{"prompt": "a", "completion": "bcde"}])
    said = "rows.jsonl:1: its answer has 5 tokens with the one that ends it"
    refused(SourceError, said, Bigrams(), data=[file], rows="raw", max_new_tokens=4)
    found = evaluate([Bigrams()], [file], rows="raw", max_new_tokens=5)
    assert found.results[0].max_new_tokens == 5
    assert found.notes == ["rows, bigrams: 1 of 1 answers had not ended after 5 tokens"]


def test_models_without_a_tokenizer_are_all_told_before_any_is_asked(
    base: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    names = [str(tmp_path / "one"), str(base), str(tmp_path / "two"), str(tmp_path / "none")]
    with pytest.raises(SourceError) as caught:
        evaluate(names, [rows(tmp_path)])
    told = str(caught.value)
    assert f"{names[0]}: has no tokenizer" in told
    assert f"{names[2]}: has no tokenizer" in told
    assert names[3] in told


def test_logits_that_are_no_numbers_are_an_error_with_model_and_task(
    base: Path, tmp_path: Path
) -> None:
    who = speaker(base)
    with torch.no_grad():
        who.model.get_output_embeddings().weight[3].fill_(float("nan"))  # type: ignore[operator]
    refused(OperatorError, "logits that are not numbers", who, data=[rows(tmp_path)], rows="raw")
    never = Bigrams()
    never.table[never.id("a"), never.id("b")] = -math.inf
    file = rows(tmp_path, [{"prompt": "a", "completion": "b"}], "never.jsonl")
    refused(OperatorError, "bigrams on never: ", never, data=[file], rows="raw")
    refused(OperatorError, "no finite log-probability", never, data=[file], rows="raw")


def test_chat_rows_need_a_template(tmp_path: Path) -> None:
    file = rows(tmp_path, [{"prompt": "a", "completion": "b"}])
    refused(SourceError, "no chat template", Bigrams(), data=[file], rows="chat")


# ---- memory, order


def test_logits_are_held_of_a_bounded_number_of_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MOST", 50)
    seen: list[int] = []
    read = Bigrams.read

    def spy(self: Bigrams, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        logits = read(self, tokens, mask, at)
        seen.append(len(logits))
        return logits

    monkeypatch.setattr(Bigrams, "read", spy)
    texts = [{"text": "x" * (7 * i % 31 + 1)} for i in range(20)]
    evaluate([Bigrams()], [rows(tmp_path, texts)])
    assert max(seen) <= 50
    assert len(seen) < 20  # short ones share a batch


def test_models_are_in_memory_one_after_the_other(tmp_path: Path) -> None:
    file = rows(tmp_path, [{"text": "abc"}])
    alive: list[weakref.ref[Bigrams]] = []

    def opener() -> Bigrams:
        gc.collect()
        assert all(held() is None for held in alive)
        made = Bigrams()
        alive.append(weakref.ref(made))
        return made

    found = evaluate({"one": opener, "two": opener}, {"named": file})
    assert [(r.model, r.task) for r in found.results] == [("one", "named"), ("two", "named")]


def test_notes_say_what_makes_figures_hard_to_compare(tmp_path: Path) -> None:
    plain, talks = Bigrams(), Bigrams()
    talks.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    asked = [{"prompt": "a", "completion": "b"}] * 3
    found = evaluate({"plain": plain, "talks": talks}, [rows(tmp_path, asked)], limit=2)
    assert any("the first 2 of 3 rows" in note for note in found.notes)
    assert any("prompts were not written alike (plain raw, talks chat)" in n for n in found.notes)


# ---- the command line


def test_the_command_prints_a_table_for_each_task(base: Path, tmp_path: Path) -> None:
    file = rows(tmp_path)
    done = cli("eval", str(base), str(file), "--task", f"again={file}", "--rows", "raw",
               "--limit", "2", "--measure", "loss", "--measure", "exact_match")  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"rows: 2 rows of {file} (prompt + completion)"
    assert lines[1].split() == ["model", "loss", "exact", "match"]
    assert lines[2].split()[0] == "base"
    assert any(line.startswith("again: ") for line in lines)
    assert "note: rows: the first 2 of 24 rows alone" in lines
    assert f"{base}: rows: 4 rows" in done.stderr


def test_json_holds_every_figure_and_the_chain(base: Path, tmp_path: Path) -> None:
    one, two = rows(tmp_path, ROWS[:3], "one.jsonl"), rows(tmp_path, ROWS[3:6], "two.jsonl")
    twin = tmp_path / "twin"
    small_base(twin)
    done = cli("eval", str(base), str(one), str(twin), str(two), "--chain", "--json", "--quiet",
               "--rows", "raw", "--measure", "loss")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["models"] == [str(base), str(twin)]
    assert [task["name"] for task in found["tasks"]] == ["one", "two"]
    values = [result["measures"]["loss"]["value"] for result in found["results"]]
    kept_of = found["chain"]["loss"]
    assert kept_of["matrix"] == [values[:2], values[2:]]
    assert kept_of["forgetting"] == 0.0  # the same model twice
    assert kept_of["average_performance"] == pytest.approx(sum(values[2:]) / 2)
    text = cli("eval", str(base), str(one), str(twin), str(two), "--chain", "--rows", "raw",
               "--measure", "loss").stdout  # fmt: skip
    assert "chain: base -> twin" in text
    assert "backward transfer" in text


def test_a_page_a_chart_and_answers_are_written(base: Path, tmp_path: Path) -> None:
    file = rows(tmp_path, ROWS[:4])
    page, chart, told = tmp_path / "p.html", tmp_path / "p.png", tmp_path / "a.jsonl"
    words = ["eval", str(base), str(file), "--rows", "raw", "--answers", str(told)]
    words += ["--report", str(page), "--plot", str(chart)]
    assert cli(*words).exit_code == 0
    assert "exact match" in page.read_text()
    assert chart.read_bytes().startswith(b"\x89PNG")
    found = [json.loads(line) for line in told.read_text().splitlines()]
    assert [one["prompt"] for one in found] == [row["prompt"] for row in ROWS[:4]]
    assert {"model", "task", "row", "answer", "expected", "exact_match"} <= found[0].keys()
    again = cli(*words)
    assert (again.exit_code, "--overwrite" in again.stderr) == (6, True)
    assert cli(*words, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (2, "no model is named", ["x.jsonl"]),
        (3, "no data are named", ["base"]),
        (2, "both be the task 'x'", ["base", "x.jsonl", "--task", "x=y.jsonl"]),
        (2, "--task takes NAME=FILE", ["base", "--task", "x"]),
        (4, "none.jsonl: cannot be read", ["base", "none.jsonl"]),
        (3, "no measure is called 'bleu'", ["base", "{rows}", "--measure", "bleu"]),
        (4, "error: ./nowhere: no such folder", ["./nowhere", "{rows}"]),
    ],
)
def test_words_that_make_no_sense_end_in_a_line_and_a_code(
    code: int, said: str, words: list[str], base: Path, tmp_path: Path
) -> None:
    file = str(rows(tmp_path))
    given = [word.replace("{rows}", file).replace("base", str(base)) for word in words]
    done = cli("eval", *given)
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr


# ---- lm-evaluation-harness


def test_without_the_harness_its_tasks_are_refused_with_how_to_get_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_ft.evaluation.harness.find_spec", lambda name: None)
    done = cli("eval", str(base), "--harness", "arc_easy")
    assert done.exit_code == 3
    assert "pip install 'lm_eval[hf]'" in done.stderr


def harness_double(monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]) -> dict[str, Any]:
    """Put a double of lm_eval in its place, not the package: what it is asked is kept."""
    asked: dict[str, Any] = {}

    def simple_evaluate(**words: Any) -> dict[str, Any]:
        asked.update(words)
        if "nonsense" in words["tasks"]:
            raise KeyError("nonsense")
        return {"results": results, "config": {}}

    def hflm(**words: Any) -> Any:
        asked["wrapped"] = words
        return SimpleNamespace(**words)

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models")}
    modules["lm_eval.models.huggingface"] = ModuleType("lm_eval.models.huggingface")
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.models.huggingface"].HFLM = hflm  # type: ignore[attr-defined]
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_the_harness_is_asked_of_the_loaded_model(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "arc_easy": {
            "alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.01,
            "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A",
        }
    }  # fmt: skip
    asked = harness_double(monkeypatch, told)
    found = evaluate([str(base)], harness=["arc_easy"], limit=5, batch=4)
    figures = found.harness[str(base)]["arc_easy"]
    assert (figures["acc"].value, figures["acc"].stderr) == (0.25, 0.01)
    assert figures["exact_match (strict)"].stderr is None
    assert (asked["tasks"], asked["limit"]) == (["arc_easy"], 5)
    assert asked["wrapped"]["batch_size"] == 4
    assert type(asked["wrapped"]["pretrained"]).__name__ == "LlamaForCausalLM"
    shown = cli("eval", str(base), "--harness", "arc_easy").stdout
    assert "arc_easy" in shown
    assert "0.2500" in shown


def test_what_the_harness_refuses_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness_double(monkeypatch, {})
    refused(OperatorError, "nonsense", str(base), data=(), harness=["nonsense"])
    refused(PlanError, "not one transformers model", Bigrams(), data=(), harness=["arc_easy"])
