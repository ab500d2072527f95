"""Plans of several documents: stages that others name as their models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_ft.plan import Reading, read

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str | None, *models: str) -> str:
    named = f"name: {name}\n" if name else ""
    listed = "".join(f"- {{model: {m}, parameters: {{weight: 1}}}}\n" for m in models)
    return f"{named}merge_method: linear\nmodels:\n{listed}"


def plan(*documents: str) -> Reading:
    return read("---\n".join(documents))


def only_fault(*documents: str) -> str:
    reading = plan(*documents)
    assert len(reading.faults) == 1, reading.faults
    return str(reading.faults[0])


def test_the_document_without_a_name_is_written_whatever_the_order() -> None:
    last = stage(None, "first", "./c")
    for documents in ((stage("first", "./a", "./b"), last), (last, stage("first", "./a", "./b"))):
        reading = plan(*documents)
        assert reading.plan is not None and not reading.faults
        assert reading.plan.name is None
        assert [str(entry.model) for entry in reading.plan.models] == ["first", "./c"]
        assert list(reading.stages) == ["first"]


def test_where_all_have_names_the_one_that_no_other_uses_is_written() -> None:
    reading = plan(stage("last", "first", "./c"), stage("first", "./a", "./b"))
    assert reading.plan is not None and not reading.faults
    assert reading.plan.name == "last"


def test_the_text_of_the_plan_holds_every_document() -> None:
    documents = (stage("first", "./a"), stage(None, "first"))
    reading = plan(*documents)
    assert reading.plan is not None
    assert reading.plan.text == "---\n".join(documents)


def test_mappings_in_a_list_are_stages() -> None:
    models: list[Any] = [{"model": "./a", "parameters": {"weight": 1}}]
    first = {"name": "first", "merge_method": "linear", "models": models}
    last = {"merge_method": "linear", "models": [{**models[0], "model": "first"}]}
    reading = read([first, last])
    assert reading.plan is not None and not reading.faults
    again = read(reading.plan.text).plan
    assert again is not None and again.model_dump() == reading.plan.model_dump()
    bad = read([{**first, "modles": 1}, last])
    assert "plan[0]" in str(bad.faults[0])


def test_two_documents_of_one_name_are_a_fault() -> None:
    said = only_fault(stage("x", "./a"), stage("x", "./b"), stage(None, "x"))
    assert said == "plan:6:7: two documents are named 'x' (first on line 1); rename one"


def test_a_second_document_without_a_name_is_a_fault() -> None:
    assert "only the output may have none" in only_fault(stage(None, "./a"), stage(None, "./b"))


def test_a_stage_that_nothing_uses_is_a_fault() -> None:
    said = only_fault(stage("x", "./a"), stage("y", "./b"), stage(None, "x"))
    assert said.startswith("plan:6:7: 'y' has no effect")


def test_two_outputs_are_a_fault() -> None:
    said = only_fault(stage("x", "./a"), stage("y", "./b"))
    assert "no other document uses 'x', nor 'y', and one is written" in said


def test_a_circle_of_stages_is_a_fault_where_it_closes() -> None:
    said = only_fault(stage("x", "y"), stage("y", "x"), stage(None, "x"))
    assert said.startswith("plan:9:11: stages need each other in a circle: x <- y <- x")
    assert "circle: x <- x" in only_fault(stage("x", "x"), stage(None, "x"))


def test_a_stage_has_no_revision() -> None:
    said = only_fault(stage("x", "./a"), stage(None, "x@main"))
    assert "has no revision; drop '@main'" in said


def test_a_name_that_is_also_a_path_must_be_told_apart(here: Path) -> None:
    (here / "x").mkdir()
    said = only_fault(stage("x", "./a"), stage(None, "x"))
    assert "rename the stage, or write ./x" in said
    assert plan(stage("y", "./x"), stage(None, "y")).faults == []


def test_a_name_must_be_one_that_a_model_can_have() -> None:
    told = [fault.message for fault in plan(stage("x@y", "./a"), stage(None, "x@y")).faults]
    assert any("'x@y' cannot name a stage" in message for message in told)


def test_faults_of_every_document_come_in_one_report() -> None:
    reading = plan("nmae: q\n" + stage("x", "./a"), "dtpye: float16\n" + stage(None, "x"))
    assert [fault.line for fault in reading.faults] == [1, 7]


def test_a_parameter_of_one_stage_is_looked_up_in_that_stage() -> None:
    reading = plan(stage("x", "./a"), stage(None, "x", "./b"))
    assert reading.lookup is not None
    assert len(reading.lookup.members()) == 2
    assert reading.stages["x"].lookup is not None
