"""Single files of tensors, without a config, as sources."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mergekit_ft
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.sources import open_source
from tests.small_models import cli, merged, no_reading, refused, tensors, weights

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "tuned")):
        save_file(weights(seed), f"{name}.safetensors")
    return tmp_path


def plan(first: str = "base.safetensors", second: str = "tuned.safetensors") -> str:
    models = "".join(
        f"  - {{model: ./{m}, parameters: {{weight: 0.5}}}}\n" for m in (first, second)
    )
    return f"merge_method: linear\nmodels:\n{models}"


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(path), **options)
    return str(caught.value)


def half_of_both() -> dict[str, Tensor]:
    one, other = weights(0), weights(1)
    return {name: one[name] * 0.5 + other[name] * 0.5 for name in one}


def test_two_files_merge_into_a_folder_with_one_file() -> None:
    merged(plan())
    made = tensors("out")
    for name, wanted in half_of_both().items():
        torch.testing.assert_close(made[name], wanted)
    names = {path.name for path in Path("out").iterdir()}
    assert names == {
        "model.safetensors",
        "README.md",
        "mergekit_config.yml",
        "mergekit_ft.lock.json",
    }


def test_a_merge_of_files_verifies() -> None:
    merged(plan())
    found = cli("verify", "out", "--full", "--inputs")
    assert found.exit_code == 0, found.output
    save_file(weights(2), "tuned.safetensors")
    assert cli("verify", "out").exit_code == 1


def test_a_file_and_a_folder_merge() -> None:
    Path("folder").mkdir()
    save_file(weights(1), "folder/model.safetensors")
    Path("folder/config.json").write_text('{"model_type": "llama"}')
    merged(plan("folder"))
    assert Path("out/config.json").exists()


def test_pickled_files_are_read_only_when_asked() -> None:
    torch.save(weights(1), "tuned.pt")
    refused(4, "--allow-pickle", plan(second="tuned.pt"))
    merged(plan(second="tuned.pt"), "out", "--allow-pickle")
    torch.testing.assert_close(tensors("out"), half_of_both())


def test_a_missing_tensor_is_an_error_before_any_byte(monkeypatch: Any) -> None:
    short = weights(1)
    del short["lm_head.weight"]
    save_file(short, "tuned.safetensors")
    no_reading(monkeypatch)
    refused(4, "lm_head.weight", plan())


def test_tensors_without_a_config_are_not_tied() -> None:
    assert open_source("base.safetensors").ties == {}


def test_an_output_that_would_replace_a_file_is_refused() -> None:
    before = hashlib.sha256(Path("base.safetensors").read_bytes()).hexdigest()
    Path("models").mkdir()
    Path("tuned.safetensors").rename("models/tuned.safetensors")
    refused(6, "holds", plan(second="models/tuned.safetensors"), "models", "--overwrite")
    assert hashlib.sha256(Path("base.safetensors").read_bytes()).hexdigest() == before


def test_what_is_no_file_of_tensors_is_refused_by_name(here: Path) -> None:
    Path("notes.txt").write_text("nothing")
    assert "holds no tensors by its name" in refusal(here / "notes.txt")
    Path("broken.safetensors").write_text("no")
    assert "not a safetensors file" in refusal(here / "broken.safetensors")


def test_one_shard_of_a_model_is_not_a_model(here: Path) -> None:
    Path("base.safetensors").rename("model-00001-of-00002.safetensors")
    assert "one shard of 2" in refusal(here / "model-00001-of-00002.safetensors")


def test_an_adapters_factors_are_no_model(here: Path) -> None:
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)}, "lora.safetensors")
    assert "holds an adapter" in refusal(here / "lora.safetensors")


def test_a_file_has_no_revision(here: Path) -> None:
    assert "has no revision" in refusal(here / "base.safetensors", revision="main")


def test_no_model_can_be_loaded_without_a_config() -> None:
    with pytest.raises(PlanError, match=r"has no config\.json"):
        mergekit_ft.load(plan())
    with mergekit_ft.open_plan(plan()) as found:
        torch.testing.assert_close(dict(found), half_of_both())
