"""config.json keeps its text but for the keys that a merge must change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_ft.checkpoint.config import config_bytes
from mergekit_ft.checkpoint.json_text import edited
from mergekit_ft.plan import read
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.sources import open_source
from mergekit_ft.sources.derived import derived
from mergekit_ft.stages import resolve
from tests.checkpoints import write_checkpoint
from tests.small_models import weights

ODD = '\ufeff{\n\t"a" : [1,\n 2], "b": {"n": 1e-05, "e": {}},\r\n  "\\u0063": "x}\\"{"\n}\n'


def test_an_edit_changes_its_value_and_no_other_byte() -> None:
    assert edited(ODD, {"b.n": 7}) == ODD.replace("1e-05", "7")
    assert edited(ODD, {"c": "y"}) == ODD.replace('"x}\\"{"', '"y"')
    assert edited(ODD, {}) == ODD


@pytest.mark.parametrize(
    ("edits", "wanted"),
    [
        ({"a": None}, {"b": {"n": 1e-05, "e": {}}, "c": 'x}"{'}),
        ({"c": None}, {"a": [1, 2], "b": {"n": 1e-05, "e": {}}}),
        ({"b.e.k": True}, {"a": [1, 2], "b": {"n": 1e-05, "e": {"k": True}}, "c": 'x}"{'}),
        ({"d.k": "ü"}, {"a": [1, 2], "b": {"n": 1e-05, "e": {}}, "c": 'x}"{', "d": {"k": "ü"}}),
        ({"b.n": None, "b.e": None}, {"a": [1, 2], "b": {}, "c": 'x}"{'}),
        ({"gone": None, "b.gone": None}, {"a": [1, 2], "b": {"n": 1e-05, "e": {}}, "c": 'x}"{'}),
    ],
)
def test_keys_are_set_added_and_left_out(edits: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert json.loads(edited(ODD, edits).removeprefix("\ufeff")) == wanted


def test_a_list_is_written_as_transformers_writes_it() -> None:
    before = {"kinds": ["full", "full"], "layers": 2}
    after = {"kinds": ["full", "part", "full"], "layers": 3}
    text = json.dumps(before, indent=2)
    assert edited(text, after) == json.dumps(after, indent=2)


def test_a_key_with_a_dot_in_its_name_is_found_before_a_path() -> None:
    assert edited('{"a.b": 1, "a": {"b": 2}}', {"a.b": 3}) == '{"a.b": 3, "a": {"b": 2}}'


def test_the_edits_of_a_derived_donor_reach_its_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", weights(0), config={"n": 1, "dtype": "float32"})
    plan = read({"merge_method": "linear", "models": [{"model": str(folder)}], "dtype": "bfloat16"})
    assert plan.plan is not None
    source = open_source(str(folder))
    donor = derived(source, source.values(), source.reader, edits={"n": 2, "more": [1]})
    found = Resolution(plan.plan, None, donor, (donor,), [])
    assert json.loads(config_bytes(found) or b"") == {"n": 2, "dtype": "bfloat16", "more": [1]}


def test_without_edits_the_bytes_are_the_donors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", weights(0), config={})
    (folder / "config.json").write_bytes(ODD.encode())
    text = {
        "merge_method": "linear",
        "models": [{"model": str(folder), "parameters": {"weight": 1}}],
    }
    assert config_bytes(resolve(read(text))) == ODD.encode()
