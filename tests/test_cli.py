"""The command line: what it prints, how it ends, what it imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from mergekit_ft import cli, registry
from mergekit_ft.errors import MergekitError, OperatorError, PlanError, SourceError, WriteError
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
UP = "model.layers.0.mlp.up_proj.weight"
PLAN = """\
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./one
    parameters: {weight: 0.5}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 1.0), ("one", 3.0)):
        write_checkpoint(tmp_path / name, {UP: torch.full((4, 4), value)}, config={"a": 1})
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


def call(*words: str, **options: Any) -> Result:
    return CliRunner().invoke(cli.main, words, **options)


def shell(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mergekit_ft", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


def test_merge_writes_the_checkpoint_and_says_what_changed(home: Path) -> None:
    done = call("merge", "plan.yaml", "out")
    assert done.exit_code == 0, done.output
    assert load_file(home / "out" / "model.safetensors")[UP].tolist() == [[2.0] * 4] * 4
    assert "out: changed 1 of 1 tensor, 64 B" in done.stdout


def test_merge_takes_a_plan_from_stdin(home: Path) -> None:
    for plan in (PLAN, json.dumps({"merge_method": "linear", "models": [{"model": "./one"}]})):
        done = call("merge", "-", "out", "--overwrite", "--allow-unchanged", input=plan)
        if "weight" in plan:
            assert done.exit_code == 0, done.output
        else:
            assert done.exit_code == 3
            assert "plan:1:" in done.stderr and "weight" in done.stderr


def test_quiet_says_nothing() -> None:
    done = call("merge", "plan.yaml", "out", "--quiet")
    assert (done.exit_code, done.output) == (0, "")


def test_json_is_all_that_stdout_holds() -> None:
    merged = json.loads(call("merge", "plan.yaml", "out", "--json").stdout)
    assert (merged["out"], merged["tensors"], merged["changed"]) == ("out", 1, 1)
    assert json.loads(call("check", "plan.yaml", "--json").stdout)["method"] == "task_arithmetic"
    assert json.loads(call("verify", "out", "--json").stdout)["ok"] is True
    assert json.loads(call("inspect", "out", "--json").stdout)["parameters"] == 16
    listed = json.loads(call("methods", "--json").stdout)
    assert [entry["name"] for entry in listed] == registry.names()


def test_options_of_merge_reach_the_engine(home: Path) -> None:
    done = call(
        "merge", "plan.yaml", "out", "--memory", "64MiB", "--threads", "1", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    done = call("merge", "plan.yaml", "out", "--device", "abacus", "--overwrite")
    assert done.exit_code == 5
    assert "abacus" in done.stderr


def test_a_typo_in_a_plan_names_its_place_and_the_nearest_word(home: Path) -> None:
    (home / "plan.yaml").write_text(PLAN.replace("weight", "wieght"))
    for command in (("merge", "plan.yaml", "out"), ("check", "plan.yaml")):
        done = call(*command)
        assert done.exit_code == 3
        assert "plan.yaml:5:18: unknown key 'wieght'" in done.stderr
        assert "did you mean 'weight'?" in done.stderr
        assert "Traceback" not in done.output
    assert not (home / "out").exists()


def test_exit_codes_tell_what_kind_of_fault_it_was(home: Path) -> None:
    assert call("merge", "plan.yaml", "out").exit_code == 0
    assert call("verify", "out").exit_code == 0
    assert call("merge", "plan.yaml", "out").exit_code == 6  # there already
    (home / "out" / "config.json").write_text("{}")
    assert call("verify", "out").exit_code == 1
    assert call("merge").exit_code == 2
    assert call("merge", "plan.yaml", "out2", "--memory", "1 potato").exit_code == 2
    assert call("check", "nowhere.yaml").exit_code == 3
    assert call("card", "teis").exit_code == 3
    assert call("card", "teis").stderr.startswith("unknown method 'teis'; did you mean 'ties'?")
    assert call("inspect", "nowhere").exit_code == 4
    assert call("verify", "base").exit_code == 4
    assert call("merge", "plan.yaml", "out3", "--memory", "1kB").exit_code == 5


@pytest.mark.parametrize("kind", [PlanError, SourceError, OperatorError, WriteError])
def test_every_error_ends_in_its_own_code_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, kind: type[MergekitError]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("this went wrong")

    monkeypatch.setattr("mergekit_ft.engine.merge", fail)
    done = call("merge", "plan.yaml", "out")
    assert done.exit_code == kind.exit_code
    assert "this went wrong" in done.stderr
    assert "Traceback" not in done.output


def exit_codes(text: str) -> dict[int, str]:
    said = text.split("Exit codes:")[1].split("interrupted")[0] + "interrupted"
    return {int(code): word for code, word in re.findall(r"(\d+)\s+([a-z]+)", said)}


def test_help_and_readme_agree_on_exit_codes_and_commands() -> None:
    codes = {kind.exit_code for kind in (PlanError, SourceError, OperatorError, WriteError)}
    said = exit_codes(call("--help").stdout)
    assert set(said) == {0, cli.DIFFERENT, 2, *codes, cli.INTERRUPTED}
    if not (ROOT / "README.md").exists():
        pytest.skip("needs a checkout")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert exit_codes(readme) == said
    for command in cli.main.commands:
        assert re.search(rf"(`|mergekit-ft ){command}\b", readme), command


def test_help_lists_the_commands_and_every_option_has_a_line() -> None:
    for name, command in cli.main.commands.items():
        assert name in call("--help").stdout
        assert command.help
        options = [param for param in command.params if param.param_type_name == "option"]
        assert all(getattr(option, "help", None) for option in options)


def test_methods_card_and_schema_know_every_method() -> None:
    for name in registry.names():
        assert re.search(rf"^{name}\s", call("methods").stdout, re.MULTILINE)
        assert call("card", name).stdout.strip() == registry.card(name).strip()
    schema = json.loads(call("schema").stdout)
    named = {choice["const"] for choice in schema["properties"]["merge_method"]["oneOf"]}
    assert named == set(registry.names("operator"))


def test_inspect_and_check_print_text() -> None:
    assert f"{UP}" in call("inspect", "base").stdout
    assert "output: 1 tensor: 1 merged" in call("check", "plan.yaml").stdout


def test_verify_full_recomputes_everything_and_prints_the_verdict() -> None:
    call("merge", "plan.yaml", "out", "--quiet")
    done = call("verify", "out", "--full", "--inputs")
    assert done.exit_code == 0
    assert "tensors: 1 of 1 tensor computed again" in done.stdout
    assert done.stdout.splitlines()[-1] == "as recorded"


def test_ctrl_c_names_resume_and_ends_in_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_ft.engine.merge", interrupt)
    done = call("merge", "plan.yaml", "out")
    assert done.exit_code == 130
    assert "--resume" in done.stderr.strip().splitlines()[-1]


SLOWED = """
import time
from mergekit_ft.writer import Writer
write = Writer.write
Writer.write = lambda *given: (time.sleep(0.1), write(*given))[1]
from mergekit_ft.cli import main
main(["merge", "plan.yaml", "out"])
"""


def test_an_interrupted_merge_leaves_no_output_and_resumes_to_the_same_bytes(home: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        made = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{i}.w.weight": torch.randn(1024, 1024, generator=made) for i in range(8)
        }
        write_checkpoint(home / name, tensors)
    plan = PLAN.replace("task_arithmetic", "ties") + "parameters: {density: 0.3}\n"
    (home / "plan.yaml").write_text(plan)
    command = [sys.executable, "-c", SLOWED]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (home / "out.part").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith("interrupted") and "--resume" in said
    assert "Traceback" not in said
    assert not (home / "out").exists()
    assert shell("merge", "plan.yaml", "out", "--resume").returncode == 0
    assert shell("merge", "plan.yaml", "whole").returncode == 0
    one, two = (home / name / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == two.read_bytes()


def test_off_a_terminal_progress_is_plain_lines_on_stderr() -> None:
    done = shell("merge", "plan.yaml", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "merging into out: 192 B to move\n"
    assert "\r" not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [("methods",), ("--help",), ("--version",), ("card", "ties")])
def test_what_needs_no_tensors_imports_no_torch(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom mergekit_ft.cli import main\n"
        f"try: main({list(words)!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'transformers', 'yaml', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_methods_answers_without_what_takes_long_to_import() -> None:
    """How fast that is, `benchmarks/speed.py` measures."""
    text = (
        "import sys\n"
        "from mergekit_ft.cli import main\n"
        "main(['methods'], standalone_mode=False)\n"
        "slow = {'torch', 'transformers', 'numpy', 'safetensors', 'peft', 'matplotlib'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "task_arithmetic" in done.stdout


def test_version_is_the_packages() -> None:
    from mergekit_ft import __version__

    assert __version__ in call("--version").stdout
