"""`mergekit-ft edit`: facts go into a patch, which goes on, comes off, and is extended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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


def test_a_checkpoint_holds_what_the_patch_would_and_the_base_stays_as_it_was() -> None:
    before = hashes("base")
    edited()
    edited("--output", "checkpoint", out="out")
    assert cli("delta", "apply", "base", "p.safetensors", "on").exit_code == 0
    assert hashes("out")["model.safetensors"] == hashes("on")["model.safetensors"]
    assert hashes("base") == before
    assert len(Path("out/mergekit_ft.edits.jsonl").read_text().splitlines()) == len(FACTS)
    assert "facts edited into it" in Path("out/README.md").read_text()
    checked = cli("verify", "out")
    assert checked.exit_code == 0, checked.output
    assert "an editing is not repeated" in checked.output
    again = cli("edit", "base", "facts.jsonl", "out", "--output", "checkpoint")
    assert again.exit_code != 0
    assert "--overwrite" in again.stderr


def test_files_that_stay_the_bases_are_linked_where_that_is_asked_for() -> None:
    split = {f"model-0000{i}-of-00002.safetensors": {} for i in (1, 2)}  # type: dict[str, Any]
    for name, tensor in tensors("base").items():
        split[f"model-0000{2 if name == NAME else 1}-of-00002.safetensors"][name] = tensor
    Path("base/model.safetensors").unlink()
    for file, held in split.items():
        save_file(held, f"base/{file}", metadata={"format": "pt"})
    places = {name: file for file, held in split.items() for name in held}
    Path("base/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    before = hashes("base")
    edited("--output", "checkpoint", "--link", out="out")
    one, two = split
    assert Path(f"out/{one}").samefile(f"base/{one}")
    assert not Path(f"out/{two}").samefile(f"base/{two}")
    assert hashes("out")[two] != before[two]
    assert hashes("base") == before
    assert cli("verify", "out").exit_code == 0
    edited("--output", "checkpoint", out="copied")
    assert not Path(f"copied/{one}").samefile(f"base/{one}")
    assert {n: h for n, h in hashes("copied").items() if n in split} == {
        n: h for n, h in hashes("out").items() if n in split
    }


def test_the_name_of_the_output_fits_its_kind() -> None:
    wrong = cli("edit", "base", "facts.jsonl", "out", "--layer", "1")
    assert "output delta is a file that ends in .safetensors" in wrong.stderr
    wrong = cli("edit", "base", "facts.jsonl", "p.safetensors", "--output", "checkpoint")
    assert "output checkpoint is a folder" in wrong.stderr
    wrong = cli("edit", "base", "facts.jsonl", "p.safetensors", "--link")
    assert "link has no effect" in wrong.stderr


def test_what_evaluate_finds_is_what_score_finds_of_the_patch() -> None:
    facts = [{**FACTS[0], "rephrase": ["Ur has the capital"], "locality": ["a b c"]}, *FACTS[1:]]
    write("asked.jsonl", facts)
    told = json.loads(edited("--evaluate", "--json", facts="asked.jsonl").stdout)
    found = told["evaluation"]
    patched = '{"model": "base", "delta": "p.safetensors"}'
    scored = cli("edits", "score", "base", patched, "asked.jsonl", "--json", "--quiet")
    assert scored.exit_code == 0, scored.output
    wanted = json.loads(scored.stdout)
    assert found["after"] == wanted["after"]
    assert found["before"] == wanted["before"]
    assert found["after"]["reliability"]["value"] > found["before"]["reliability"]["value"]
    held = open_delta(Path("p.safetensors"), "p").words["provenance"]["facts"]
    assert held["evaluation"] == found
    wrong = cli("edit", "base", "asked.jsonl", "q.safetensors", "--report", "r.html")
    assert wrong.exit_code == 2
    assert "of what --evaluate finds" in wrong.stderr


def test_the_search_tries_layers_and_tells_what_it_chose() -> None:
    facts = [{**fact, "rephrase": [f"so {fact['prompt']}"]} for fact in FACTS]
    write("asked.jsonl", facts)
    given = ("edit", "base", "asked.jsonl", "p.safetensors", "--layer", "search")
    result = cli(*given, "--set", "learning_rate=1e-2", "--set", "epochs=20", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    table = told["search"]
    assert {row["layer"] for row in table if row["round"] == 1} == {0, 1}
    (last,) = [row for row in table if row["round"] == 2]
    assert told["tensors"] == [f"model.layers.{last['layer']}.mlp.down_proj.weight"]
    first = {row["layer"]: row for row in table if row["round"] == 1}
    other = first[1 - last["layer"]]
    mine = first[last["layer"]]
    assert (mine["drift"] > 0.2, -mine["generalization"], mine["loss"]) <= (
        other["drift"] > 0.2,
        -other["generalization"],
        other["loss"],
    )
    assert f"layer {last['layer']} is chosen" in result.stderr
    without = cli("edit", "base", "facts.jsonl", "q.safetensors", "--layer", "search")
    assert "of which the edits have none" in without.stderr


def test_layers_that_were_tried_do_not_show_in_what_is_taught(tmp_path: Path) -> None:
    facts = [{**fact, "rephrase": [f"so {fact['prompt']}"]} for fact in FACTS]
    write("asked.jsonl", facts)
    given = ("--set", "learning_rate=1e-2", "--set", "epochs=20", "--json", "--quiet")
    found = cli("edit", "base", "asked.jsonl", "p.safetensors", "--layer", "search", *given)
    layer = json.loads(found.stdout)["tensors"][0].split(".")[2]
    plain = cli("edit", "base", "asked.jsonl", "q.safetensors", "--layer", layer, *given)
    assert plain.exit_code == 0, plain.output
    for words in "pq":
        assert cli("delta", "apply", "base", f"{words}.safetensors", words).exit_code == 0
    assert hashes("p")["model.safetensors"] == hashes("q")["model.safetensors"]


def test_a_killed_run_leaves_nothing_and_the_next_writes_the_same(tmp_path: Path) -> None:
    edited()
    slow = [sys.executable, "-m", "mergekit_ft", "edit", "base", "facts.jsonl", "q.safetensors"]
    more = ["--layer", "1", "--set", "learning_rate=1e-2", "--set", "batch=2"]
    run = subprocess.Popen(
        [*slow, *more, "--set", "epochs=100000", "--set", "stop=0", "--set", "skip=0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith("epoch 3"):
            break
    run.kill()
    run.wait()
    assert [p.name for p in Path().glob("q*")] == []
    edited(out="q.safetensors")
    assert Path("q.safetensors").read_bytes() == Path("p.safetensors").read_bytes()
