"""Editors that solve, on a small model: what is refused, what is told, what is remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ft import registry
from mergekit_ft.editing import moments
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.rewritten import Rewritten
from mergekit_ft.editing.solving import solve
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.models.opening import Base
from tests.small_models import models  # noqa: F401
from tests.solved import ASKED, module_of, near, opened, run, second_moment, text


def solved(editor: Any, base: Base, text: Path | None) -> Rewritten:
    encoder = Encoder(base.tokenizer)
    return solve(editor, base, encoder, ASKED, text=text, seed=0, say=lambda line: None)


def test_all_edits_without_their_subject_are_told_by_line(tmp_path: Path) -> None:
    odd = [Edit("e.jsonl:4", "Is it so?", "no", "Peru"), Edit("e.jsonl:9", "No", "no")]
    with pytest.raises(SourceError) as told:
        run("memit", opened(tmp_path, "llama"), tmp_path, [*ASKED, *odd])
    first, second = str(told.value).splitlines()
    assert first == "e.jsonl:4: the subject 'Peru' does not occur in 'Is it so?'"
    assert second.startswith("e.jsonl:9: has no subject")


def test_layers_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"layers \[2, 4\]: this model has layers 0 to 3"):
        run("memit", opened(tmp_path, "llama"), tmp_path, layers=(2, 4))


def test_statistics_need_a_text_and_say_how_long(tmp_path: Path) -> None:
    base = opened(tmp_path, "llama")
    editor = registry.of_kind("memit", "editor")()
    with pytest.raises(PlanError, match=r"a text is needed.* at least 480 tokens"):
        solved(editor, base, None)
    with pytest.raises(OperatorError, match=r"100 tokens are too few for keys of 48"):
        solved(editor, base, text(tmp_path, letters=100))


def test_rome_without_covariance_needs_no_text(tmp_path: Path) -> None:
    editor = registry.of_kind("rome", "editor")(steps=2, covariance=False)
    found = solved(editor, opened(tmp_path, "llama"), None)
    assert found.facts["statistics"] == {}


def test_the_same_seed_writes_the_same_bits_and_the_receipt_says_of_what(tmp_path: Path) -> None:
    one = run("memit", opened(tmp_path, "llama"), tmp_path)
    two = run("memit", opened(tmp_path, "llama"), tmp_path)
    assert one.held.keys() == two.held.keys()
    assert all(torch.equal(one.held[name], two.held[name]) for name in one.held)
    assert one.facts == two.facts
    known = one.facts["statistics"]
    assert known and all(of["tokens"] == 3000 for of in known.values())
    assert len(one.facts["value_losses"]) == 3
    assert json.dumps(one.facts)


def test_statistics_are_those_of_the_model_before_any_edit(tmp_path: Path) -> None:
    base = opened(tmp_path, "llama")
    module = module_of(base, "model.layers.1.mlp.down_proj.weight")
    expected = second_moment(base, module, tmp_path)
    run("memit", base, tmp_path, layers=(0, 1))
    cached = sorted((tmp_path / "cache" / "statistics").glob("*.safetensors"))
    seen = [moments._read(file) for file in cached]
    assert any(near(of.second, expected) for of in seen)
