"""The registry: names and summaries from the disk, classes on demand."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mergekit_ft import registry
from mergekit_ft.contract import Operator
from mergekit_ft.errors import PlanError
from mergekit_ft.fusing import Fusion
from mergekit_ft.learning import Objective, Tuner
from mergekit_ft.looking import Probe
from mergekit_ft.rewriting import Editor

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_listing_methods_imports_neither_torch_nor_pydantic_nor_a_method() -> None:
    heavy = run_python(
        "import sys\n"
        "from mergekit_ft import registry\n"
        "[registry.summary(name) for name in registry.names()]\n"
        "print([m for m in sys.modules if m in ('torch', 'pydantic', 'yaml')\n"
        "       or m.startswith('mergekit_ft.methods')])"
    )
    assert heavy.strip() == "[]"


def test_plan_registry_and_layers_import_without_torch() -> None:
    code = "import sys, mergekit_ft.plan, mergekit_ft.registry, mergekit_ft.layers\n"
    assert run_python(code + "print('torch' in sys.modules)").strip() == "False"


def test_names_are_sorted_and_hold_the_folders() -> None:
    names = registry.names()
    assert names == sorted(names)
    assert {"linear", "task_arithmetic"} <= set(names)


def test_every_summary_is_one_line() -> None:
    for name in registry.names():
        line = registry.summary(name)
        assert line and "\n" not in line


def test_every_method_is_one_class_of_its_kind() -> None:
    kinds = {
        "operator": Operator,
        "tuner": Tuner,
        "objective": Objective,
        "probe": Probe,
        "fusion": Fusion,
        "editor": Editor,
    }
    for kind, owed in kinds.items():
        assert all(issubclass(registry.of_kind(n, kind), owed) for n in registry.names(kind))
    assert sum(len(registry.names(kind)) for kind in kinds) == len(registry.names())


def test_a_method_of_another_kind_is_told_what_it_is() -> None:
    with pytest.raises(PlanError, match=r"lift is a tuner, .*, not a method that merges"):
        registry.method("lift")
    with pytest.raises(PlanError, match="ties is a method that merges, not an objective"):
        registry.of_kind("ties", "objective")


def test_the_kind_of_a_method_is_that_of_its_class() -> None:
    from mergekit_ft.contract import Adjustment

    for name in registry.names("operator"):
        adjusts = issubclass(registry.method(name), Adjustment)
        assert registry.kind(name) == ("adjustment" if adjusts else "operator")


def test_an_unknown_method_names_the_nearest_and_the_list() -> None:
    with pytest.raises(PlanError, match="unknown method 'task_aritmetic'; did you mean 'task_ari"):
        registry.method("task_aritmetic")
    with pytest.raises(PlanError, match=r"\(methods: .*linear"):
        registry.summary("zzz")


def test_case_and_dashes_do_not_hide_the_nearest_method() -> None:
    assert registry.nearest("Task-Arithmetic", ["linear", "task_arithmetic"]) == ["task_arithmetic"]


def third_party(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, value: str) -> None:
    monkeypatch.syspath_prepend(str(folder))
    point = EntryPoint(name, value, registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {name: point})


def write_module(folder: Path, name: str, exported: str = "['Mine']") -> None:
    (folder / name).mkdir()
    (folder / name / "README.md").write_text("# my card\n")
    (folder / name / "__init__.py").write_text(
        '"""My method.\n\nMore of it."""\n'
        "from mergekit_ft.contract import Operator\n"
        "class Mine(Operator):\n    pass\n"
        f"__all__ = {exported}\n"
    )


def test_an_entry_point_is_a_method_like_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_module(tmp_path, "third_one")
    third_party(monkeypatch, tmp_path, "mine", "third_one")
    assert "mine" in registry.names()
    assert registry.summary("mine") == "My method."
    assert "third_one" not in sys.modules
    assert registry.card("mine") == "# my card\n"
    assert registry.method("mine").__name__ == "Mine"


def test_an_entry_point_may_name_its_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_module(tmp_path, "third_two", exported="[]")
    third_party(monkeypatch, tmp_path, "mine", "third_two:Mine")
    assert registry.method("mine").__name__ == "Mine"


def test_a_module_that_exports_no_class_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_module(tmp_path, "third_three", exported="[]")
    third_party(monkeypatch, tmp_path, "mine", "third_three")
    with pytest.raises(PlanError, match="must export one method"):
        registry.method("mine")


def test_two_methods_of_one_name_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    third_party(monkeypatch, tmp_path, "linear", "somewhere")
    with pytest.raises(PlanError, match="both built in and an entry point"):
        registry.method("linear")
