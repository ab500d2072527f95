"""Every tuner and objective: its card, its plan, and that it trains what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergekit_ft import registry
from mergekit_ft.plan import ModelReference
from mergekit_ft.plan.fields import parameters_of
from mergekit_ft.plan.tuning import read_tune
from mergekit_ft.resolution.opening import open_reference
from mergekit_ft.tuning import tune
from tests.cards import SECTIONS, section, shown, table
from tests.tuned import ROWS, rows, small_base

METHODS = Path(__file__).parents[1] / "methods"
KINDS = {name: registry.kind(name) for name in registry.names()}
LEARNED = [name for name, kind in KINDS.items() if kind in ("tuner", "objective")]


@pytest.mark.parametrize("name", LEARNED)
def test_a_card_says_what_the_method_is(name: str) -> None:
    assert re.findall(r"^## (.+)$", registry.card(name), re.M) == list(SECTIONS)
    assert len(section(name, "What it computes").strip().splitlines()) <= 3
    assert re.search(r"```bibtex\n@\w+\{\w+,\n.*\n```", section(name, "Citation"), re.S)
    known = parameters_of(registry.of_kind(name, KINDS[name]))
    listed = {row[0].strip("`"): row[3] for row in table(name, "Parameters")}
    assert listed == {word: shown(parameter.default) for word, parameter in known.items()}
    assert all(row[1] and row[2] for row in table(name, "Parameters"))
    assert all(parameter.description for parameter in known.values())


@pytest.mark.parametrize("name", LEARNED)
def test_a_card_names_code_that_exists(name: str) -> None:
    module = __import__(f"mergekit_ft.methods.{name}.{name}", fromlist=[name])
    for _, cell in table(name, "Paper to code"):
        for dotted in re.findall(r"`([\w.]+)`", cell):
            found: Any = module
            for word in dotted.split("."):
                assert hasattr(found, word), f"{name}: {dotted}"
                found = getattr(found, word)


@pytest.mark.parametrize("name", LEARNED)
def test_a_methods_plan_runs_and_changes_the_base(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_base(tmp_path / "base")
    rows(tmp_path)
    pairs = [{**row, "rejected": " no"} for row in ROWS]
    pairs = [{k if k != "completion" else "chosen": v for k, v in row.items()} for row in pairs]
    rows(tmp_path, pairs, "pairs.jsonl")
    plan = METHODS / name / "plan.yaml"
    made = tune(plan, "out")
    assert made.facts["trained"] > 0
    adapter = Path("out", "adapter_config.json").exists()
    words = {"model": "base", "adapter": "out"} if adapter else "out"
    before = load_file("base/model.safetensors")
    with open_reference(ModelReference.model_validate(words)) as after:
        assert before.keys() == after.keys()
        assert any(not bool((before[key] == after.tensor(key)).all()) for key in before)


@pytest.mark.parametrize("name", LEARNED)
def test_every_number_of_a_plan_says_where_it_is_from(name: str) -> None:
    lines = (METHODS / name / "plan.yaml").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        words, _, said = line.partition("#")
        if re.search(r":\s*-?[0-9.]+\b", words):
            assert re.search(r"ours|paper|authors|et al\.", said), line
    assert not read_tune(METHODS / name / "plan.yaml").faults
