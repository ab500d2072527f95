"""Every probe: its card, its plan, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_ft import registry
from mergekit_ft.plan.fields import parameters_of
from tests.small_models import cli, models, write_models

__all__ = ["models"]

METHODS = Path(__file__).parents[1] / "methods"
PROBES = registry.names("probe")


def test_there_are_probes() -> None:
    assert {"intruder_dimensions", "sensitivity"} <= set(PROBES)


@pytest.mark.parametrize("name", PROBES)
def test_a_card_lists_every_parameter_and_code_that_exists(name: str) -> None:
    card = registry.card(name)
    known = parameters_of(registry.of_kind(name, "probe"))
    table = card.split("## Parameters")[1].split("## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \|.*\| `([^`]+)` \|[^|]*\|$", table, re.M))
    assert listed == {word: str(p.default) for word, p in known.items()}
    module = __import__(f"mergekit_ft.methods.{name}.{name}", fromlist=[name])
    for dotted in re.findall(r"`([\w.]+)` \|$", card.split("## Paper to code")[1], re.M):
        found = module
        for word in dotted.split("."):
            found = getattr(found, word)


@pytest.mark.parametrize("name", PROBES)
def test_a_probes_plan_runs(name: str) -> None:
    plan = METHODS / name / "plan.yaml"
    result = cli("probe", str(plan), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["probe"] == name and report["tensors"]
    assert cli("probe", str(plan)).exit_code == 0


def test_a_probe_is_no_merge_and_a_merge_no_probe() -> None:
    text = "merge_method: sensitivity\nbase_model: base\nmodels: [{model: maths}]\n"
    result = cli("check", "-", text=text)
    assert result.exit_code == 3
    assert "sensitivity is a probe, for `mergekit-ft probe`" in result.stderr
    result = cli("probe", "ties", "base", "maths")
    assert result.exit_code == 3 and "ties is a method that merges" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("intruder_dimension", "base", "maths"), "did you mean 'intruder_dimensions'?"),
        (("intruder_dimensions", "base"), "looks at 2 models, the base first; 1 are named"),
        (("intruder_dimensions", "base", "maths", "--set", "kk=3"), "unknown parameter 'kk'"),
        (("intruder_dimensions", "base", "maths", "--set", "k=0"), "k must be at least 1"),
        (("intruder_dimensions", "base", "maths", "--include", "x*"), "matches no tensor"),
        (("intruder_dimensions", "base", "nowhere"), "nowhere"),
        (("intruder_dimensions", "base", "maths", "--memory", "1kB"), "must be seen whole"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], told: str) -> None:
    result = cli("probe", *words)
    assert result.exit_code in (3, 4, 5)
    assert told in result.stderr and len(result.stderr.splitlines()) == 1


def test_models_of_another_shape_and_nan_are_told() -> None:
    held = load_file("maths/model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(held, "maths/model.safetensors", {"format": "pt"})
    result = cli("probe", "sensitivity", "base", "maths")
    assert result.exit_code == 4 and "shape [3, 3], [16, 8] in the base" in result.stderr
    write_models(Path())
    held = load_file("maths/model.safetensors")
    held["model.norm.weight"][2] = torch.nan
    save_file(held, "maths/model.safetensors", {"format": "pt"})
    result = cli("probe", "sensitivity", "base", "maths")
    assert result.exit_code == 5 and "model.norm.weight holds NaN" in result.stderr


def test_a_report_and_a_picture_are_written_whole(tmp_path: Path) -> None:
    words = ("probe", "intruder_dimensions", "base", "maths", "--report", "r.html")
    assert cli(*words, "--plot", "p.svg").exit_code == 0
    page = Path("r.html").read_text()
    assert "Intruder dimensions" in page and "self_attn.q_proj" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert Path("p.svg").read_text().startswith("<?xml")
    again = cli(*words)
    assert again.exit_code == 6 and "--overwrite replaces it" in again.stderr
    plan = ("probe", "sensitivity", "base", "maths", "chat", "--report", "s.html")
    assert cli(*plan).exit_code == 0 and "model.layers.*.mlp" in Path("s.html").read_text()


def test_a_picture_of_nothing_and_an_idle_word_are_refused() -> None:
    words = ("probe", "sensitivity", "base", "maths")
    result = cli(*words, "--include", "model.norm.weight", "--plot", "p.svg")
    assert result.exit_code == 6 and "there is nothing to draw" in result.stderr
    result = cli(*words, "--overwrite")
    assert result.exit_code == 2 and "is about the files of --report" in result.stderr
