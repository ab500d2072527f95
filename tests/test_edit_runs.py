"""`mergekit-ft edit`: facts go into a patch, which goes on, comes off, and is extended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from mergekit_ft.editing.run import edit
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.sources.delta_file import open_delta
from tests.small_models import cli, hashes, tensors
from tests.tuned import small_base

FACTS = [
    {"prompt": f"the capital of {place} is", "target": city}
    for place, city in [("Ur", "Om"), ("Ka", "Lo"), ("Mu", "Ti"), ("Pe", " Ra")]
]
TRAINED = ("--set", "learning_rate=1e-2", "--set", "epochs=40", "--set", "batch=2", "--quiet")
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with ./base and facts.jsonl."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small_base(tmp_path / "base", dtype=torch.bfloat16)
    write("facts.jsonl", FACTS)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def edited(*words: str, out: str = "p.safetensors", facts: str = "facts.jsonl") -> Result:
    result = cli("edit", "base", facts, out, "--layer", "1", *TRAINED, *words)
    assert result.exit_code == 0, result.output
    return result


def test_a_patch_goes_on_and_comes_off_to_the_same_hash() -> None:
    before = hashes("base")
    edited()
    assert cli("delta", "apply", "base", "p.safetensors", "on").exit_code == 0
    changed = {n for n, t in tensors("on").items() if not torch.equal(t, tensors("base")[n])}
    assert changed == {NAME}
    assert tensors("on")[NAME].dtype == torch.bfloat16
    assert cli("delta", "revert", "on", "p.safetensors", "off").exit_code == 0
    assert hashes("off")["model.safetensors"] == before["model.safetensors"]
    assert hashes("base") == before


def test_the_same_run_writes_the_same_patch_and_another_seed_another() -> None:
    edited()
    edited(out="q.safetensors")
    edited("--seed", "1", out="r.safetensors")
    one, two, three = (Path(f"{n}.safetensors").read_bytes() for n in "pqr")
    assert one == two
    assert one != three


def test_the_patch_holds_the_edits_and_is_extended_from_the_original() -> None:
    edited()
    write("more.jsonl", [{"prompt": "the king of Ur is", "target": "Al"}])
    edited("--extend", "p.safetensors", out="q.safetensors", facts="more.jsonl")
    write("all.jsonl", [*FACTS, {"prompt": "the king of Ur is", "target": "Al"}])
    edited(out="r.safetensors", facts="all.jsonl")
    q, r = open_delta(Path("q.safetensors"), "q"), open_delta(Path("r.safetensors"), "r")
    assert q.words["provenance"]["edits"] == r.words["provenance"]["edits"]
    assert len(q.words["provenance"]["edits"]) == 5
    for words in ("q", "r"):
        assert cli("delta", "apply", "base", f"{words}.safetensors", words).exit_code == 0
    assert torch.equal(tensors("q")[NAME], tensors("r")[NAME])


def test_a_patch_of_another_base_is_neither_applied_nor_extended() -> None:
    edited()
    other = {name: tensor + 1 for name, tensor in tensors("base").items()}
    shutil.copytree("base", "on")
    save_file(other, "on/model.safetensors", metadata={"format": "pt"})
    assert cli("delta", "apply", "on", "p.safetensors", "out").exit_code != 0
    result = cli("edit", "on", "facts.jsonl", "q.safetensors", "--extend", "p.safetensors")
    assert result.exit_code != 0
    assert "from the original" in result.stderr
    assert not Path("q.safetensors").exists()


def test_two_patches_of_one_tensor_are_refused_with_the_way_out() -> None:
    edited()
    edited("--seed", "1", out="q.safetensors")
    assert cli("delta", "apply", "base", "p.safetensors", "on").exit_code == 0
    second = cli("delta", "apply", "on", "q.safetensors", "both")
    assert second.exit_code != 0
    assert "put it on that model" in second.stderr
    result = cli("delta", "compose", "p.safetensors", "q.safetensors", "both.safetensors")
    assert result.exit_code != 0
    assert "a merge plan averages the models that they make" in result.stderr


def test_an_edit_that_rounding_undoes_is_an_error() -> None:
    rate = {"learning_rate": 1e-9, "layer": 1, "epochs": 1}
    plan = {"base": "base", "edits": "facts.jsonl", "editor": {"locft_bf": rate}}
    with pytest.raises(OperatorError, match="lost by rounding"):
        edit(plan, "p.safetensors")
    assert sorted(p.name for p in Path().glob("p.*")) == []


def test_an_edit_that_is_known_is_an_error() -> None:
    known = {"skip": 1e6, "stop": 0.0, "layer": 1, "epochs": 1}
    plan = {"base": "base", "edits": "facts.jsonl", "editor": {"locft_bf": known}}
    with pytest.raises(OperatorError, match="nothing changed"):
        edit(plan, "p.safetensors")


def test_one_prompt_with_two_targets_is_refused_by_its_lines() -> None:
    write("two.jsonl", [FACTS[0], {**FACTS[0], "target": "Xi"}])
    plan = {"base": "base", "edits": "two.jsonl", "editor": "locft_bf"}
    with pytest.raises(SourceError, match=r"two.jsonl:2: the prompt of two.jsonl:1"):
        edit(plan, "p.safetensors")


def test_prompts_to_keep_are_needed_where_they_are_asked_for() -> None:
    result = cli("edit", "base", "facts.jsonl", "p.safetensors", "--set", "divergence=1")
    assert result.exit_code != 0
    assert "locality" in result.stderr


def test_edits_behind_other_text_are_taught_too() -> None:
    told = json.loads(edited("--set", "prefixes=2", "--json").stdout)
    assert told["edits"] == 4
    assert told["steps"] == 40 * 6  # 12 texts, 2 of a step


def test_a_plan_and_flags_are_not_mixed() -> None:
    Path("plan.yaml").write_text("base: base\nedits: facts.jsonl\neditor: locft_bf\n")
    result = cli("edit", "plan.yaml", "p.safetensors", "--layer", "1")
    assert result.exit_code == 2
    assert "write these options into it" in result.stderr


def test_the_layer_by_depth_is_said_to_be_a_rule_of_thumb() -> None:
    result = cli("edit", "base", "facts.jsonl", "p.safetensors", "--set", "learning_rate=1e-2")
    assert result.exit_code == 0, result.output
    assert "rule of thumb" in result.stderr
