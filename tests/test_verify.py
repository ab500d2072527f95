"""`verify` finds what has changed, and computes tensors again by another path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.engine import merge
from mergekit_ft.errors import SourceError
from mergekit_ft.inspection import recompute, verify
from tests.checkpoints import write_checkpoint

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}
UP = "model.layers.1.mlp.up_proj.weight"


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    return {name: torch.randn(8, 12, generator=made).to(dtype) for name in names} | {
        "model.steps": torch.tensor([7])
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(home: Path, dtype: torch.dtype = torch.float32) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(home / name, weights(seed, dtype), config=CONFIG)


def plan(method: str = "task_arithmetic", **words: Any) -> dict[str, Any]:
    models = [{"model": f"./{name}", "parameters": {"weight": 0.4}} for name in ("one", "two")]
    return {"merge_method": method, "base_model": "./base", "models": models, **words}


def merged(home: Path, words: dict[str, Any] | None = None, **options: Any) -> Path:
    if not (home / "base").exists():
        prepared(home)
    return merge(words or plan(), home / "out", threads=1, **options).out


def rehashed(out: Path) -> None:
    """Write the hashes of what lies there now into the receipt, as a careful liar would."""
    import hashlib

    path = out / "mergekit_ft.lock.json"
    receipt = json.loads(path.read_text())
    for name in receipt["outputs"]:
        data = (out / name).read_bytes()
        file = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        receipt["outputs"][name] = file
    path.write_text(json.dumps(receipt))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fresh_merge_is_as_recorded_in_every_dtype(home: Path, dtype: torch.dtype) -> None:
    prepared(home, dtype)
    report = verify.verify(merged(home), sample=None)
    assert report["ok"]
    assert report["files"]["checked"] == 4  # weights, config, card, plan
    assert report["inputs"]["checked"] == 3
    assert (report["tensors"]["recomputed"], report["tensors"]["of"]) == (7, 7)


@pytest.mark.parametrize(
    "words",
    [
        plan("ties", parameters={"density": 0.5}),
        plan("ties", parameters={"density": 0.5, "scope": "model"}),
        plan("dare_ties", parameters={"density": 0.5}),
        plan("dare_linear", parameters={"density": 0.5}),
        plan(then=[{"lines": {"alpha": "auto", "beta": 0.5}}]),
        plan("linear", parameters={"weight": 0.2}, then=[{"lines": {"gamma": 0.3}}]),
        plan("slerp", models=["one"], parameters={"t": [0.2, 0.7]}),
        plan("lines", models=["one"], parameters={"alpha": 0.2, "beta": 0.8}),
    ],
    ids=lambda words: f"{words['merge_method']}-{len(words.get('then', ()))}",
)
def test_every_method_is_computed_again(home: Path, words: dict[str, Any]) -> None:
    words["models"] = [{"model": m} if isinstance(m, str) else m for m in words["models"]]
    assert verify.verify(merged(home, words), sample=None)["ok"]


def test_a_changed_byte_is_found_by_its_hash(home: Path) -> None:
    out = merged(home)
    change(out, lambda tensors: tensors[UP].view(-1)[3].add_(1e-7))
    report = verify.verify(out, sample=0)
    assert not report["ok"]
    assert report["files"]["differ"] == [
        {"file": "model.safetensors", "problem": "has another SHA-256"}
    ]


def test_a_wrong_value_is_found_by_computing_it_again_though_the_hash_agrees(home: Path) -> None:
    out = merged(home)
    change(out, lambda tensors: tensors[UP].view(-1)[3].add_(1e-2))
    rehashed(out)
    report = verify.verify(out, sample=None)
    assert report["files"]["differ"] == []
    (found,) = report["tensors"]["differ"]
    assert found["name"] == UP
    assert found["problem"].startswith("differs in 1 of 96 elements, by at most 0.01")
    assert not report["ok"]


def test_a_bfloat16_value_two_units_off_is_found_and_one_is_rounding(home: Path) -> None:
    prepared(home, torch.bfloat16)
    out = merged(home)
    for units, fine in ((1, True), (1, False)):  # one, then another on top
        change(out, lambda tensors, n=units: tensors[UP].view(torch.int16).view(-1)[3].add_(n))
        rehashed(out)
        assert verify.verify(out, sample=None)["ok"] is fine


def test_a_tensor_that_no_operator_touches_must_agree_to_the_bit(home: Path) -> None:
    out = merged(home)
    change(out, lambda tensors: tensors["model.steps"].add_(1))
    rehashed(out)
    (found,) = verify.verify(out, sample=None)["tensors"]["differ"]
    assert found["name"] == "model.steps"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tensors: tensors.pop(UP), "is missing"),
        (lambda tensors: tensors.update({UP: tensors[UP].half()}), "is F16 [8, 12]"),
        (lambda tensors: tensors.update({UP: tensors[UP][:4].clone()}), "is F32 [4, 12]"),
    ],
)
def test_a_tensor_of_another_kind_is_named(home: Path, edit: Any, problem: str) -> None:
    out = merged(home)
    change(out, edit)
    rehashed(out)
    assert verify.verify(out, sample=None)["tensors"]["differ"] == [
        {"name": UP, "problem": problem}
    ]


def test_missing_and_cut_files_are_named_and_strange_ones_listed(home: Path) -> None:
    out = merged(home)
    (out / "config.json").unlink()
    (out / "README.md").write_text("short")
    (out / "model-old.txt").write_text("")
    report = verify.verify(out, sample=0)
    problems = {item["file"]: item["problem"] for item in report["files"]["differ"]}
    assert problems["config.json"] == "is missing"
    assert problems["README.md"].startswith("has 5 bytes, not ")
    assert report["files"]["extra"] == ["model-old.txt"]


def test_a_changed_input_is_found(home: Path) -> None:
    out = merged(home)
    change(home / "one", lambda tensors: tensors[UP].view(-1)[0].add_(1e-6))
    (home / "two" / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1e6}))
    report = verify.verify(out, sample=0)
    assert report["inputs"]["differ"] == [
        {"file": "./one: model.safetensors", "problem": "has another SHA-256"},
        {"file": "./two: config.json", "problem": "has changed"},
    ]
    assert verify.verify(out, sample=0, inputs=False)["ok"]


def test_inputs_that_are_gone_are_told_and_on_request_an_error(home: Path) -> None:
    out = merged(home)
    shutil.rmtree(home / "one")
    report = verify.verify(out)
    assert report["ok"]
    assert report["tensors"] is None
    assert "./one" in report["absent"]
    assert any("no tensor computed again" in line for line in verify.lines(report))
    with pytest.raises(SourceError, match=r"\./one"):
        verify.verify(out, inputs=True)


def test_an_input_that_no_longer_fits_is_a_difference(home: Path) -> None:
    out = merged(home)
    change(home / "one", lambda tensors: tensors.update({UP: tensors[UP][:4].clone()}))
    report = verify.verify(out)
    assert not report["ok"]
    assert UP in report["inputs"]["differ"][0]["problem"]


def test_relative_paths_are_found_from_above_the_output_or_from_a_root(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = merged(home, plan("dare_linear", parameters={"density": 0.5}))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert verify.verify(out, sample=None)["tensors"]["recomputed"] == 7
    moved = shutil.move(out, elsewhere / "moved")
    assert verify.verify(Path(moved))["absent"]
    report = verify.verify(Path(moved), sample=None, root=home)
    assert report["ok"] and report["tensors"]["recomputed"] == 7


def test_the_sample_is_the_same_for_a_seed_and_another_for_another(home: Path) -> None:
    out = merged(home)
    asked: list[str] = []

    def names(seed: int) -> list[str]:
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            real = recompute.compare
            patch.setattr(
                recompute,
                "compare",
                lambda task, *rest: asked.append(task.name) or real(task, *rest),
            )
            verify.verify(out, sample=2, seed=seed)
        return list(asked)

    drawn = [names(seed) for seed in range(8)]
    assert drawn == [names(seed) for seed in range(8)]
    assert all(len(sample) == 2 for sample in drawn)
    assert len({tuple(sample) for sample in drawn}) > 1


def test_tensors_above_the_memory_are_skipped_by_name(home: Path) -> None:
    report = verify.verify(merged(home), sample=None, memory=1000)
    assert report["tensors"]["recomputed"] == 1  # model.steps alone
    assert UP in [skipped["name"] for skipped in report["tensors"]["skipped"]]
    assert any(line.startswith(f"  {UP}: not computed again") for line in verify.lines(report))


def test_a_folder_without_receipt_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no mergekit_ft\.lock\.json"):
        verify.verify(tmp_path)


def test_verify_shares_no_code_with_the_block_loop() -> None:
    for module in (verify, recompute):
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert "mergekit_ft.blocks" not in text
        assert "mergekit_ft.passes" not in text
        assert "mergekit_ft.engine" not in text
