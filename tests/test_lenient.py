"""`--lenient` sets aside what mergekit reads without effect, tells it, and does no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_ft import merge
from mergekit_ft.plan import read
from tests.small_models import arithmetic, cli, merged, refused, same_bytes, tensors
from tests.small_models import models as models

IDLE = [  # a plan of task arithmetic with one thing that mergekit 0.1.5 reads without effect
    arithmetic(more="modles: oops\n"),
    arithmetic(more="normalize: true\n"),
    arithmetic(more="parameters: {normalise: true}\n"),
    arithmetic(more="parameters: {density: 0.1}\n"),
    arithmetic().replace("{weight: 0.5}", "{weight: 0.5, wieght: 2}"),
    arithmetic().replace("{weight: 0.5}", "{weight: 0.5, lambda: 7}"),
    arithmetic().replace("{weight: 0.5}", "{weight: 9, weight: 0.5}"),
    arithmetic().replace("{model: ./maths,", "{model: ./maths, mdoel: ./chat,"),
    arithmetic("{path: ./maths, revison: main}"),
    arithmetic(more="  - {model: ./base, parameters: {weight: 3}}\n"),
    arithmetic(weight="[{value: 0.9, filter: self_atn}, {value: 0.5}]"),
    arithmetic(weight="[{value: 0.5}, {value: 9, filter: mlp}]"),
    arithmetic(weight="[{value: 0.5, fliter: mlp}]"),
    arithmetic(weight="[]", more="parameters: {weight: 0.5}\n"),
    arithmetic(more="parameters: {weight: 0.25}\n"),
]
FAULTS = [  # what is wrong in mergekit too, or would be another model here
    arithmetic(weight="heavy"),
    arithmetic().replace("task_arithmetic", "task-arithmetic"),
    arithmetic("./nowhere"),
    arithmetic().replace("model: ./maths", "mdoel: ./maths"),
    arithmetic().replace("weight", "wieght"),
    arithmetic(weight="[{value: 0.5, filter: mlp, fliter: x}]"),
    arithmetic(weight="[{vale: 0.5}]"),
    arithmetic(weight="[{value: 0.9, match: '*.self_atn.*'}, {value: 0.5}]"),
    arithmetic(weight="[{value: 0.9, layers: 7..9}, {value: 0.5}]"),
    arithmetic(more="then:\n  - lines: {beta: 0.5, alpa: 1}\n"),
    arithmetic(weight="[]"),
]


@pytest.mark.parametrize("text", IDLE)
def test_words_without_effect_are_refused_and_lenient_merges_as_if_they_were_not_there(
    text: str,
) -> None:
    done = cli("merge", "-", "out", text=text)
    assert done.exit_code == 3 and not Path("out").exists()
    *_, hint = done.stderr.splitlines()
    assert hint.startswith("hint: mergekit reads this without effect: `mergekit-ft migrate`")
    assert "--lenient" in hint
    done = merged(text, "out", "--lenient")
    merged(arithmetic(), "plain")
    assert len(same_bytes(tensors("out"), tensors("plain"))) == 12
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note: plan:")]
    assert note.endswith("(set aside)")


@pytest.mark.parametrize("text", FAULTS)
def test_a_true_fault_stays_one(text: str) -> None:
    done = cli("merge", "-", "out", "--lenient", text=text)
    assert done.exit_code in (3, 4), done.output
    assert not Path("out").exists() and not Path("out.part").exists()
    assert "hint:" not in done.stderr


def test_remarks_are_kept_in_the_receipt_and_verify_reads_the_plan_as_the_merge_did() -> None:
    text = arithmetic(more="modles: oops\n")
    merged(text, "out", "--lenient")
    lock = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    said = "plan:5:1: unknown key 'modles'; did you mean 'models'?"
    assert lock["options"]["lenient"] is True
    assert lock["plan"].rstrip() == text.rstrip()
    assert lock["notes"][0].startswith(said)
    assert "\n- plan:5:1: unknown key 'modles'" in Path("out/README.md").read_text()
    assert cli("verify", "out", "--full").exit_code == 0


def test_check_tells_the_same_remarks() -> None:
    text = arithmetic(more="modles: oops\n")
    assert cli("check", "-", text=text).exit_code == 3
    done = cli("check", "-", "--lenient", text=text)
    assert done.exit_code == 0
    assert "note: plan:5:1: unknown key 'modles'" in done.stdout


def test_python_is_lenient_where_it_is_asked_to_be() -> None:
    plan = {"merge_method": "linear", "models": [{"model": "./maths"}], "dtpye": "float16"}
    plan["parameters"] = {"weight": 1.0}
    result = merge(plan, "out", lenient=True, allow_unchanged=True)
    assert result.notes[0].startswith("plan: dtpye: unknown key 'dtpye'")


def test_of_two_like_keys_a_lenient_reading_takes_the_last() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nname: a\nname: b\n"
    strict, lenient = read(text), read(text, lenient=True)
    assert [fault.aside for fault in strict.faults] == ["name on line 3"]
    assert lenient.faults == [] and lenient.accepted().name == "b"


def test_only_some_faults_without_effect_are_counted() -> None:
    text = arithmetic("./nowhere", more="normalize: false\nmodles: oops\n")
    done = cli("merge", "-", "out", text=text)
    assert "mergekit reads 2 of these 3 without effect" in done.stderr
    refused(4, "no such folder", text, "out", "--lenient")
