"""The house stands: what ships, what a method's folder holds, how long things are."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_ft import registry

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("mergekit_ft", "methods")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
METHODS = sorted(path.parent for path in (ROOT / "methods").glob("*/__init__.py"))
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build in place leaves build/, whose stale files ship with the next one.
    copy = tmp_path_factory.mktemp("checkout")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, copy, cwd=copy)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_carries_what_git_would_and_nothing_else(wheel: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *ROOMS)
    listed = {name for name in run("git", *listing, cwd=ROOT).split("\0") if name}
    present = {name for name in listed if (ROOT / name).exists()}  # a deletion not yet committed
    expected = {re.sub(r"^methods/", "mergekit_ft/methods/", name) for name in present}
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert carried == expected


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the python of a venv that has our wheel, and only borrows its dependencies."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, "--disable-pip-version-check", wheel, cwd=venv.parent)
    paths = {"base": str(venv), "platbase": str(venv)}
    site = Path(sysconfig.get_path("purelib", scheme="posix_prefix", vars=paths))
    # A .pth line is one more path; the .pth files found there, our editable one too, stay unread.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def outside(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return kept | {"HF_HUB_OFFLINE": "1"} | more


def tiny_checkpoint(folder: Path, value: float) -> Path:
    folder.mkdir()
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    weights = {name: torch.full((2, 3), value + i) for i, name in enumerate(names)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_installed_wheel_lists_its_methods_from_another_folder(
    bare: Path, tmp_path: Path
) -> None:
    where = run(
        bare, "-c", "import mergekit_ft as m; print(m.__file__)", cwd=tmp_path, env=outside()
    )
    assert Path(where.strip()).is_relative_to(bare.parents[1])
    listed = run(bare, "-m", "mergekit_ft", "methods", cwd=tmp_path, env=outside())
    assert {folder.name for folder in METHODS} <= set(re.findall(r"\w+", listed))
    script = run(bare.parent / "mergekit-ft", "methods", cwd=tmp_path, env=outside())
    assert script == listed


def test_the_installed_wheel_merges_from_another_folder(bare: Path, tmp_path: Path) -> None:
    one, three = tiny_checkpoint(tmp_path / "one", 1.0), tiny_checkpoint(tmp_path / "three", 3.0)
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (one, three)]
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"merge_method": "linear", "models": models}, indent=1))
    run(bare, "-m", "mergekit_ft", "merge", plan, tmp_path / "out", cwd=tmp_path, env=outside())
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    merged = load_file(weights)
    assert merged["model.embed_tokens.weight"].tolist() == [[2.0] * 3] * 2
    assert merged["model.layers.0.mlp.up_proj.weight"].tolist() == [[3.0] * 3] * 2


def test_the_package_and_the_changelog_name_the_version_we_ship() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert importlib.import_module("mergekit_ft").__version__ == version
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_there_are_methods() -> None:
    assert METHODS


@pytest.mark.parametrize("folder", METHODS, ids=lambda folder: folder.name)
def test_a_methods_folder_is_whole(folder: Path) -> None:
    name = folder.name
    wanted = {"__init__.py", f"{name}.py", "README.md", "plan.yaml"}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file()
    first = (folder / "plan.yaml").read_text(encoding="utf-8").splitlines()[0]
    commands = {"tuner": "tune", "objective": "tune", "probe": "probe", "fusion": "fuse fit"}
    commands |= {"editor": "edit"}
    command = commands.get(registry.kind(name), "merge")
    out = "" if command == "probe" else " \\S"
    assert re.match(rf"# *mergekit-ft {command} methods/{name}/plan\.yaml{out}", first), first


def test_every_folder_of_methods_is_a_method_with_a_line_in_the_table() -> None:
    folders = {path.name for path in (ROOT / "methods").iterdir() if path.is_dir()}
    names = {folder.name for folder in METHODS}
    assert folders - {"__pycache__"} == names
    table = (ROOT / "methods" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\]\(\1/README\.md\) \|", table, re.MULTILINE)) == names


def test_importing_methods_by_its_folder_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"as mergekit_ft\.methods"):
        importlib.import_module("methods")
    assert importlib.import_module("mergekit_ft.methods").__name__ == "mergekit_ft.methods"


def functions(module: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{short(module)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_over_50_lines() -> None:
    long = [(where, length) for path in MODULES for where, length in functions(path) if length > 50]
    assert long == []


def test_modules_stay_under_350_lines() -> None:
    lengths = {short(path): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length >= 350} == {}


def test_no_module_is_named_vaguely_or_like_the_standard_library() -> None:
    names = {path: path.parent.name if path.stem == "__init__" else path.stem for path in MODULES}
    taken = VAGUE | (sys.stdlib_module_names - {"__main__"})
    assert [short(path) for path, name in names.items() if name in taken] == []
