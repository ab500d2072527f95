"""`mergekit-ft edit` by editors that solve: a patch out; their cards and plans; what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_ft import cli, registry
from mergekit_ft.editing.run import edit
from mergekit_ft.errors import OperatorError, PlanError, SourceError, WriteError
from mergekit_ft.plan.editing import read_edit
from mergekit_ft.plan.fields import parameters_of
from mergekit_ft.recalling import Solver
from tests.cards import SECTIONS, section, shown, table
from tests.solved import text
from tests.tuned import small_base

METHODS = Path(__file__).parents[1] / "methods"
EDITORS = [
    name
    for name in registry.names("editor")
    if issubclass(registry.of_kind(name, "editor"), Solver)
]
ROWS: list[dict[str, Any]] = [
    {
        "id": "peru",
        "prompt": "The capital of Peru is",
        "target": "Oslo",
        "subject": "Peru",
        "rephrase": ["Peru is governed from"],
        "locality": ["Sky is", {"prompt": "Grass is", "answer": "green"}],
        "portability": [{"prompt": "Peru's river is", "answer": "the Oslo"}],
    },
    {"prompt": "Anna was born in", "target": " Rome", "subject": "Anna"},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with ./base, edits.jsonl and text.txt."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small_base(tmp_path / "base", dtype=torch.bfloat16)
    written(ROWS)
    rows = text(tmp_path).read_text().splitlines()
    Path("text.txt").write_text("\n".join(json.loads(row)["text"] for row in rows))
    return tmp_path


def written(rows: list[Any], name: str = "edits.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plan(editor: Any = "memit", **words: Any) -> dict[str, Any]:
    few = {editor: {"steps": 3}} if isinstance(editor, str) else editor
    usual = {"base": "./base", "edits": "edits.jsonl", "editor": few, "statistics": "text.txt"}
    return {k: v for k, v in {**usual, **words}.items() if v is not None}


def command(*words: str) -> Any:
    result = CliRunner().invoke(cli.main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- what an edit makes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITORS)
def test_a_methods_plan_runs_and_its_delta_changes_what_it_says(name: str) -> None:
    made = edit(METHODS / name / "plan.yaml", "out.safetensors")
    assert made.tensors == [f"model.layers.{i}.mlp.down_proj.weight" for i in made.facts["layers"]]
    assert command("delta", "apply", "base", "out.safetensors", "edited").exit_code == 0
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("base", "edited"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert sorted(changed) == sorted(made.tensors)
    assert all(after[key].dtype == torch.bfloat16 for key in after)


def test_an_edit_is_taken_off_to_the_same_hash() -> None:
    edit(plan(), "out.safetensors")
    command("delta", "apply", "base", "out.safetensors", "edited")
    assert command("delta", "revert", "edited", "out.safetensors", "back").exit_code == 0
    one, two = (
        hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()
        for folder in ("base", "back")
    )
    assert one == two


def test_what_is_said_afterwards_is_of_the_weights_as_they_are_stored() -> None:
    words = plan({"memit": {"steps": 40, "clamp": 8.0, "weight": 0.1}})
    made = edit(words, "out.safetensors")
    command("delta", "apply", "base", "out.safetensors", "edited")
    from mergekit_ft.editing.encoding import Encoder
    from mergekit_ft.editing.facts import read_edits
    from mergekit_ft.evaluation.scoring import scored
    from mergekit_ft.models.opening import open_speaker
    from mergekit_ft.plan import ModelReference

    speaker = open_speaker(ModelReference(path="edited"))
    samples = [Encoder(speaker.tokenizer).edit(e).sample for e in read_edits(["edits.jsonl"])]
    said = [found.right == found.tokens for found in scored(speaker, samples, 2)]
    assert made.facts["teacher_forced"]["stored"] == sum(said) / 2
    before, after = (load_file(f"{f}/model.safetensors") for f in ("base", "edited"))
    for name, moved in made.facts["moved"].items():
        change = (after[name].float() - before[name].float()).norm() / before[name].float().norm()
        assert moved == pytest.approx(float(change), rel=1e-4)


def test_a_patch_is_extended_from_the_original() -> None:
    edit(plan(), "one.safetensors")
    written([{"prompt": "Lima is a", "target": "hat", "subject": "Lima"}], "more.jsonl")
    edit(plan(edits="more.jsonl", extend="one.safetensors"), "two.safetensors")
    written([*ROWS, {"prompt": "Lima is a", "target": "hat", "subject": "Lima"}], "all.jsonl")
    edit(plan(edits="all.jsonl"), "three.safetensors")
    two, three = (load_file(f"{name}.safetensors") for name in ("two", "three"))
    assert two.keys() == three.keys()
    assert all(torch.equal(two[key], three[key]) for key in two)


def test_the_same_plan_writes_the_same_bytes_and_the_file_says_how() -> None:
    edit(plan(seed=3), "one.safetensors")
    edit(plan(seed=3), "two.safetensors")
    edit(plan(seed=4), "three.safetensors")
    one, two, three = (Path(f"{n}.safetensors").read_bytes() for n in ("one", "two", "three"))
    assert one == two != three
    told = command("delta", "info", "one.safetensors", "--json")
    words = json.loads(told.stdout)
    assert words["method"] == "memit" and words["seed"] == 3
    assert "corpus_sha256" in one.decode("latin1") and "Anna was born in" in one.decode("latin1")


def test_the_command_says_what_was_written_and_how_the_edits_fare() -> None:
    Path("plan.yaml").write_text(json.dumps(plan()))
    result = command("edit", "plan.yaml", "out.safetensors")
    assert result.exit_code == 0, result.output
    name = r"model\.layers\.0\.mlp\.down_proj\.weight"
    assert re.search(name + r"; 0\.0 MiB; \d+% of 2 edits are said whole", result.stdout)
    assert "statistics of layers" in result.stderr and "values: 2 of 2 edits" in result.stderr
    again = command("edit", "plan.yaml", "out.safetensors")
    assert again.exit_code == 6 and "give --overwrite" in again.stderr
    told = command("edit", "plan.yaml", "out.safetensors", "--overwrite", "--quiet", "--json")
    assert json.loads(told.stdout)["edits"] == 2
    assert told.stderr == ""


def test_flags_say_what_a_plan_says() -> None:
    flags = ("--method", "memit", "--statistics", "text.txt", "--set", "layers=[0, 1]")
    result = command("edit", "base", "edits.jsonl", "a.safetensors", *flags, "--set", "steps=3")
    assert result.exit_code == 0, result.output
    edit(plan({"memit": {"steps": 3, "layers": [0, 1]}}), "b.safetensors")
    one, two = (load_file(f"{name}.safetensors") for name in "ab")
    assert len(one) == len(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_targets_end_with_the_token_that_ends_texts_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def stop(editor: Any, base: Any, encoder: Any, edits: Any, **given: Any) -> Any:
        seen.append([encoder.edit(edit).target for edit in edits])
        raise OperatorError("enough")

    monkeypatch.setattr("mergekit_ft.editing.run.solve", stop)
    for eos in (True, False):
        with pytest.raises(OperatorError, match="enough"):
            edit(plan(eos=eos), "out.safetensors")
    (with_end, _), (without, other) = seen
    assert with_end[:-1] == without and len(without) == 5, "a blank, and four letters"
    assert len(other) == 5, "a target that has its blank gets no second"


# --- what is refused ----------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_plan_is_told_at_once() -> None:
    wrong = "bse: ./base\nedits: 3\neditor: {memit: {steps: 0, wait: 1}}\n"
    with pytest.raises(PlanError) as told:
        edit(wrong, "out.safetensors")
    said = str(told.value)
    for part in ("unknown key 'bse'; did you mean 'base'?", "missing key 'base'", "unknown key 'wa",
                 "steps", "a JSONL file, or a list of them; got 3"):  # fmt: skip
        assert part in said
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (plan("lift"), "lift is a tuner, .* not an editor"),
        (plan("memitt"), "unknown editor 'memitt'; did you mean 'memit'"),
        (plan(statistics=None), "memit needs statistics of what the model meets in text"),
        (plan({"rome": {"covariance": False}}), "statistics has no effect: rome"),
        (plan({"rome": {"layers": [0, 1]}}), "rome writes into one layer"),
        (plan({"memit": {"layers": []}}), "layers"),
        (plan({"memit": {"layers": [1, 0]}}), "layers ascend"),
        (plan({"memit": {"layers": [0, 5]}}), "this model has layers 0 to 1"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused(words: Any, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        edit(words, "out.safetensors")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a b", "target": "c"}, "has no subject"),
        ({"prompt": "a b", "target": "c", "subject": "d"}, "'d' does not occur in 'a b'"),
        ({"prompt": "a b", "target": " ", "subject": "a"}, "the target is empty"),
        ({"prompt": "a b", "target": "c", "subject": "a", "weight": 2}, "weight has no effect"),
        ({**ROWS[0], "id": "x", "target": "Bern"}, r"the prompt of edits\.jsonl:1, with another"),
    ],
)
def test_an_edit_that_cannot_be_written_is_told_by_its_line(row: Any, told: str) -> None:
    written([*ROWS, row])
    with pytest.raises(SourceError, match=rf"^edits\.jsonl:3: .*{told}"):
        edit(plan(), "out.safetensors")
    assert not Path("out.safetensors").exists()


def test_an_output_must_be_a_delta_file() -> None:
    with pytest.raises(WriteError, match="a file that ends in"):
        edit(plan(), "out")


def test_a_base_with_weights_that_are_not_numbers_leaves_nothing() -> None:
    file = Path("base/model.safetensors")
    held = load_file(file)
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(held, file, {"format": "pt"})
    with pytest.raises((OperatorError, SourceError), match="holds nan at element 0"):
        edit(plan(), "out.safetensors")
    assert not Path("out.safetensors").exists()


# --- cards and plans ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITORS)
def test_a_card_says_what_the_method_is(name: str) -> None:
    assert re.findall(r"^## (.+)$", registry.card(name), re.M) == list(SECTIONS)
    assert len(section(name, "What it computes").strip().splitlines()) <= 3
    assert re.search(r"```bibtex\n@\w+\{\w+,\n.*\n```", section(name, "Citation"), re.S)
    known = parameters_of(registry.of_kind(name, "editor"))
    listed = {row[0].strip("`"): row[3] for row in table(name, "Parameters")}
    assert listed == {word: shown(parameter.default) for word, parameter in known.items()}
    assert all(row[1] and row[2] for row in table(name, "Parameters"))
    assert all(parameter.description for parameter in known.values())


@pytest.mark.parametrize("name", EDITORS)
def test_a_card_names_code_that_exists(name: str) -> None:
    module = __import__(f"mergekit_ft.methods.{name}.{name}", fromlist=[name])
    for _, cell in table(name, "Paper to code"):
        for dotted in re.findall(r"`([\w.]+)`", cell):
            found: Any = module
            for word in dotted.split("."):
                assert hasattr(found, word), f"{name}: {dotted}"
                found = getattr(found, word)


@pytest.mark.parametrize("name", EDITORS)
def test_every_number_of_a_plan_says_where_it_is_from(name: str) -> None:
    lines = (METHODS / name / "plan.yaml").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        words, _, said = line.partition("#")
        if re.search(r":\s*-?[0-9.]+\b", words):
            assert re.search(r"ours|paper|authors|et al\.", said), line
    read_edit(METHODS / name / "plan.yaml")
