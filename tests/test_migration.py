"""`migrate`: what never had an effect goes, the rest stays as written and means the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_ft.plan import marks, read
from mergekit_ft.plan.pruning import embedded, pruned
from tests.small_models import arithmetic, cli, merged, same_bytes, tensors
from tests.small_models import models as models

OLD = """\
# a recipe from the days of old
merge_method: ties   # trimmed
base_model: ./base
normalize: false
models:
  - model: ./maths
    layer_range: [0, 3]
    parameters: {weight: 0.5, densty: 0.2, density: [{value: 0.2, filter: self_atn}, {value: 0.5}]}
  - model: ./chat
    # its own weights
    parameters:
      weight: 1     # whole
      normalize: true
      density: 0.5
      density: 0.25
  - model: ./base
    parameters: {weight: 3}
dtype: bfloat16   # stored
"""
STRICT = """\
# a recipe from the days of old
merge_method: ties   # trimmed
base_model: ./base
models:
  - model: ./maths
    parameters: {weight: 0.5, density: [{value: 0.5}]}
  - model: ./chat
    # its own weights
    parameters:
      weight: 1     # whole
      density: 0.25
  - model: ./base
dtype: bfloat16   # stored
"""


def test_an_old_plan_is_made_strict_and_keeps_its_comments_and_order() -> None:
    Path("old.yml").write_text(OLD)
    done = cli("migrate", "old.yml")
    assert done.exit_code == 0, done.output
    assert done.stdout == STRICT
    told = [line.split(":")[1] for line in done.stderr.splitlines() if "  old.yml:" in line]
    assert told == ["4", "7", "8", "8", "13", "15", "17"]
    assert "`dtype:` names the stored dtype" in done.stderr


def test_the_strict_plan_merges_to_what_the_old_one_did() -> None:
    Path("old.yml").write_text(OLD)
    assert cli("migrate", "old.yml", "-o", "new.yml").exit_code == 0
    assert cli("merge", "old.yml", "out").exit_code == 3
    assert cli("merge", "old.yml", "out", "--lenient").exit_code == 0
    done = cli("merge", "new.yml", "new")
    assert done.exit_code == 0 and "set aside" not in done.stdout
    assert len(same_bytes(tensors("out"), tensors("new"))) == 12


def test_a_strict_plan_comes_out_byte_for_byte() -> None:
    Path("new.yml").write_text(STRICT.replace("\n", "\n\n"))
    done = cli("migrate", "new.yml", "-o", "again.yml")
    assert "nothing in it is without effect" in done.stderr
    assert Path("again.yml").read_bytes() == Path("new.yml").read_bytes()


def test_a_plan_is_found_in_a_model_card_and_its_lines_are_the_cards() -> None:
    card = f"---\ntags: [merge]\n---\n# Old\n\n```bash\nls\n```\n\n```yaml\n{OLD}```\n\nmore\n"
    Path("README.md").write_text(card)
    done = cli("migrate", "README.md")
    assert done.stdout == STRICT
    assert "README.md: the plan on lines 11 to 28" in done.stderr
    assert "README.md:14:1: unknown key 'normalize'" in done.stderr
    assert cli("migrate", "-", text=card).stdout == STRICT


def test_a_card_with_two_plans_asks_which() -> None:
    Path("README.md").write_text(f"```yaml\n{STRICT}```\n~~~\n{arithmetic()}~~~\n")
    done = cli("migrate", "README.md")
    assert done.exit_code == 3
    assert "holds 2 plans (1 on line 2, 2 on line 17): pick one with --block" in done.stderr
    assert cli("migrate", "README.md", "--block", "2").stdout == arithmetic()
    assert cli("migrate", "README.md", "--block", "3").exit_code == 3


def test_a_card_without_a_plan_is_refused() -> None:
    Path("README.md").write_text("# Mine\n\n```yaml\nfoo: 1\n```\n")
    done = cli("migrate", "README.md")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "no fenced block" in done.stderr


def test_a_true_fault_is_told_and_no_plan_is_written() -> None:
    Path("old.yml").write_text(OLD.replace("ties  ", "teis  "))
    done = cli("migrate", "old.yml", "-o", "new.yml")
    assert done.exit_code == 3
    assert done.stderr.splitlines()[-1].startswith("old.yml:2:15: unknown method 'teis'")
    assert "nothing in it" not in cli("migrate", "-", text="- 1\n- 2\n").stderr
    assert "old.yml:4:1: unknown key 'normalize'" in done.stderr
    assert not Path("new.yml").exists()


def test_what_cannot_be_opened_leaves_filters_alone_and_is_told() -> None:
    Path("old.yml").write_text(OLD.replace("./chat", "./gone"))
    done = cli("migrate", "old.yml")
    assert done.exit_code == 0
    assert "note: filters were not looked up, for ./gone: no such folder" in done.stderr
    assert "filter: self_atn" in done.stdout and "normalize" not in done.stdout


def test_json_holds_the_plan_and_every_remark() -> None:
    found = json.loads(cli("migrate", "-", "--json", text=OLD).stdout)
    assert found["plan"] == STRICT
    assert {entry["what"] for entry in found["removed"]} == {
        "normalize",
        "models[0].layer_range",
        "models[0].parameters.densty",
        "models[0].parameters.density[0]",
        "models[1].parameters.normalize",
        "models[1].parameters.density on line 14",
        "models[2].parameters",
    }
    assert found["faults"] == [] and found["lines"] is None


def test_a_file_that_is_there_is_not_written_over() -> None:
    Path("new.yml").write_text("mine")
    done = cli("migrate", "-", "-o", "new.yml", text=OLD)
    assert done.exit_code == 6 and Path("new.yml").read_text() == "mine"
    assert cli("migrate", "-", "-o", "new.yml", "--overwrite", text=OLD).exit_code == 0
    assert Path("new.yml").read_text() == STRICT


CUTS = [  # text, labels that go, what is left
    ("a: 1\nb: 2\nc: 3\n", {"b"}, "a: 1\nc: 3\n"),
    ("a: 1\nb:\n  - x\n  # y\n  - z\nc: 3", {"b"}, "a: 1\nc: 3"),
    ("a: 1\nb: >\n  long\n  text\n\nc: 3\n", {"b"}, "a: 1\n\nc: 3\n"),
    ("a: {b: 1, c: 2, d: 3}\n", {"a.b", "a.d"}, "a: {c: 2}\n"),
    ("a: {b: 1, c: 2, d: 3}\n", {"a.c", "a.d"}, "a: {b: 1}\n"),
    ("a: {b: 1}\nc: 1\n", {"a.b"}, "c: 1\n"),
    ("a: [{b: 1}, {b: 2}]\nc: 1\n", {"a[0].b", "a[1]"}, "c: 1\n"),
    ("- a: 1\n  b: 2\n- c: 3\n", {"[0].a"}, "- b: 2\n- c: 3\n"),
    ("- a: 1\n  # of b\n  b: 2\n", {"[0].b"}, "- a: 1\n  # of b\n"),
    ("- a\n- b  # two\n- c\n", {"[1]"}, "- a\n- c\n"),
    ("- - a\n  - b\n- - c\n", {"[0][0]", "[1]"}, "- - b\n"),
    ("a: &p {b: 1, c: 2}\nd: *p\n", {"d"}, "a: &p {b: 1, c: 2}\n"),
    ("a: &p {b: 1, c: 2}\nd: *p\n", {"a.b", "d.b"}, "a: &p {c: 2}\nd: *p\n"),
    ("a: &p {b: 1}\nd:\n  <<: *p\n  e: 1\n", {"d.e"}, "a: &p {b: 1}\nd:\n  <<: *p\n"),
    ("'a': 1\n\"b c\": 2\n", {"b c"}, "'a': 1\n"),
    ("a: 1\na: 2\n", {"a on line 1"}, "a: 2\n"),
    ("{a: 1,\n b: 2,\n c: 3}", {"b"}, "{a: 1,\n c: 3}"),
    ("a: 1\nb: ä\nc: é # ö\n", {"b"}, "a: 1\nc: é # ö\n"),
    ("a:\n  b: 1\n  c:\nd: 1\n", {"a.c"}, "a:\n  b: 1\nd: 1\n"),
]


@pytest.mark.parametrize(("text", "labels", "left"), CUTS)
def test_only_what_is_named_goes_and_the_rest_stays_as_written(
    text: str, labels: set[str], left: str
) -> None:
    assert pruned(text, labels) == (left, True)


@pytest.mark.parametrize(
    ("text", "labels", "value"),
    [
        ("a: &p {b: 1}\nd: *p\n", {"a"}, {"d": {"b": 1}}),
        ("a: &p {b: 1, c: 2}\nd: *p\n", {"a.b"}, {"a": {"c": 2}, "d": {"b": 1, "c": 2}}),
        ("- *x\n".replace("*x", "&x a") + "- *x\n- b\n", {"[0]"}, ["a", "b"]),
    ],
)
def test_what_cannot_be_cut_is_written_anew(text: str, labels: set[str], value: object) -> None:
    left, kept = pruned(text, labels)
    assert not kept
    assert marks.parse(left, "").value == value


def test_only_fenced_blocks_with_a_method_are_plans() -> None:
    text = "merge_method: x\n\n````\n```yaml\nmerge_method: y\n```\n````\n"
    text += "  ```yml\n  merge_method: z\n  ```\n"
    assert [line for line, _ in embedded(text)] == [4, 9]
    assert read(embedded(text)[1][1]).plan is not None


def test_a_migrated_plan_merges_like_any_other() -> None:
    done = cli("migrate", "-", text=arithmetic(more="modles: oops\n"))
    merged(done.stdout)


def test_each_document_of_a_plan_loses_what_is_its_own() -> None:
    first = arithmetic(more="name: half\nmodles: oops\n")
    second = arithmetic("half", more="name: whole\nmodles: oops\nname: all\n")
    done = cli("migrate", "-", text=f"# two\n---\n{first}---  # next\n{second}")
    assert done.exit_code == 0, done.stderr
    half = arithmetic(more="name: half\n")
    expected = f"# two\n---\n{half}---  # next\n"
    assert done.stdout == expected + arithmetic("half", more="name: all\n")
    told = [line.split(":")[1] for line in done.stderr.splitlines() if "  plan:" in line]
    assert told == ["8", "15", "16"]
    merged(done.stdout)


def test_a_stack_loses_what_is_read_over_at_every_level() -> None:
    text = (
        "merge_method: passthrough   # a stack\nslices:\n  - sources:\n      - model: ./maths\n"
        "        layer_range: [0, 2]\n        foo: 1\n    residual_weight: 0.3\n"
        "  - sources: [{model: ./chat, layer_range: [1, 3], parameters: {scael: 2}}]\n"
    )
    done = cli("migrate", "-", text=text)
    assert done.stdout == (
        "merge_method: passthrough   # a stack\nslices:\n  - sources:\n      - model: ./maths\n"
        "        layer_range: [0, 2]\n  - sources: [{model: ./chat, layer_range: [1, 3]}]\n"
    )
    assert cli("merge", "-", "out", text=text).exit_code == 3
    merged(text, "out", "--lenient")
    merged(done.stdout, "strict")
    assert tensors("out").keys() == same_bytes(tensors("out"), tensors("strict"))
