"""The card of locft_bf, its plan, and what its parameters come to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_ft import registry
from mergekit_ft.errors import PlanError
from mergekit_ft.methods.locft_bf import LocftBf
from mergekit_ft.plan.editing import read_edit
from mergekit_ft.plan.fields import parameters_of
from tests.cards import SECTIONS, section, shown, table

NAME = "locft_bf"


def test_few_edits_make_small_batches() -> None:
    assert LocftBf().batch_of(3000) == 100  # the paper's
    assert LocftBf().batch_of(100) == 3  # 34 x 25 steps x 5e-4 = 0.425
    assert LocftBf().batch_of(5) == 1
    assert LocftBf(batch=10).batch_of(100) == 10


def test_the_card_lists_the_parameters() -> None:
    assert re.findall(r"^## (.+)$", registry.card(NAME), re.M) == list(SECTIONS)
    assert len(section(NAME, "What it computes").strip().splitlines()) <= 3
    known = parameters_of(registry.of_kind(NAME, "editor"))
    listed = {row[0].strip("`"): row[3] for row in table(NAME, "Parameters") if row[0] != ""}
    assert listed == {word: shown(parameter.default) for word, parameter in known.items()}


def test_the_methods_plan_is_read() -> None:
    found, editor = read_edit(Path(__file__).parents[2] / "methods" / NAME / "plan.yaml")
    assert isinstance(editor, LocftBf)
    assert (editor.layer, editor.batch, found.template) == (1, 2, "raw")


def test_all_faults_of_a_plan_are_told_at_once() -> None:
    text = "base: ./b\nedits: e.jsonl\nsed: 1\neditor:\n  locft_bf: {epoch: 3, batch: 0}\n"
    with pytest.raises(PlanError) as caught:
        read_edit(text)
    told = [str(fault) for fault in caught.value.faults]
    assert len(told) == 3
    assert "did you mean 'seed'" in told[0]
    assert any("did you mean 'epochs'" in line for line in told)
