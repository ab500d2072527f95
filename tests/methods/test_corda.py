"""CorDA cuts each matrix as the paper says, and its adapter to the base is the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ft.data.batches import Collator, batches
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.plan import ModelReference
from mergekit_ft.tuning import phases, trainer, tune
from tests.small_models import hashes
from tests.tuned import ROWS, model_of, plan, rows

TEXT = torch.arange(20, 52).view(2, 16)


def corda(home: Path, output: str = "adapter", objective: Any = "sft", **given: Any) -> Any:
    words = plan(home, {"corda": {"rank": 4, "samples": 6, **given}}, objective=objective)
    words["training"]["save_every"] = 2
    return words | {"output": output}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the phases that ran, each with its factors as they were before a step."""
    found: list[Any] = []
    train = phases.Phases.train

    def keeping(self: Any) -> Any:
        held = self.base.model.named_parameters()
        self.first = {name: p.detach().clone() for name, p in held}
        found.append(self)
        return train(self)

    monkeypatch.setattr(phases.Phases, "train", keeping)
    return found


def by_hand(base: Path, run: Any, name: str, mode: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return B0 A0 and W - B0 A0 of a layer in float64, its inputs those of the first six rows."""
    model = model_of(base).double()
    layer = model.get_submodule(name)
    fed: list[Tensor] = []
    layer.register_forward_hook(lambda _, given, __: fed.append(given[0][0].detach()))
    for batch in list(batches(run.samples, 1, Collator(0)))[:6]:
        model(batch["input_ids"])
    scaled = [x / x.max().abs() for x in fed]
    c = torch.stack([x.T @ x for x in scaled]).mean(0)
    c = c + 0.01 * c.diag().mean() * torch.eye(len(c), dtype=torch.float64)
    w = layer.weight.detach()
    u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
    part = slice(0, rank) if mode == "ipm" else slice(len(s) - rank, len(s))
    product = (u[:, part] * s[part]) @ (v[part] @ torch.linalg.inv(c))
    return product, w - product


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_a_matrix_is_cut_as_the_paper_says(mode: str, tmp_path: Path, kept: list[Any]) -> None:
    tune(corda(tmp_path, mode=mode, alpha=8.0), tmp_path / "out")
    first = kept[0].first
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        product, rest = by_hand(tmp_path / "base", kept[0], name, mode, 4)
        a, b = (first[f"{name}.lora_{side}.default.weight"].double() for side in "AB")
        assert float((2.0 * (b @ a) - product).abs().max()) < 1e-5
        assert float((first[f"{name}.base_layer.weight"].double() - rest).abs().max()) < 1e-5


def test_the_adapter_to_the_original_base_is_the_trained_model(
    tmp_path: Path, kept: list[Any]
) -> None:
    from peft import PeftModel

    words = corda(tmp_path)
    words["training"]["learning_rate"] = 0.01
    tune(words, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
    with torch.no_grad():
        wanted = kept[0].base.model.eval()(TEXT).logits
        plain = model_of(tmp_path / "base")(TEXT).logits
        model = PeftModel.from_pretrained(model_of(tmp_path / "base"), str(tmp_path / "out"))
        loaded = model.eval()(TEXT).logits
    assert float((wanted - plain).abs().max()) > 1e-3
    assert torch.allclose(loaded, wanted, atol=1e-5)
    named = {"model": str(tmp_path / "base"), "adapter": str(tmp_path / "out")}
    ours = open_speaker(ModelReference.model_validate(named))
    assert torch.allclose(ours.read(TEXT, torch.ones_like(TEXT)), wanted, atol=1e-5)
    tune(words | {"output": "full"}, tmp_path / "full")
    with torch.no_grad():
        assert torch.allclose(model_of(tmp_path / "full")(TEXT).logits, wanted, atol=1e-5)


def test_a_killed_training_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = corda(tmp_path)
    tune(words, tmp_path / "whole")
    step, done = trainer.TuningTrainer._after_step, []

    def dying(self: Any, *args: Any) -> None:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(trainer.TuningTrainer, "_after_step", dying)
    with pytest.raises(KeyboardInterrupt):
        tune(words, tmp_path / "broken")
    tune(words, tmp_path / "broken", resume=True)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")


def test_the_reference_is_the_base_and_not_what_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, told, seen = corda(tmp_path, objective="sft_kl"), trainer.said, []
    base = model_of(tmp_path / "base").eval()

    def compared(model: Any, shown: Any, batch: Any, reference: Any, before: Any) -> Any:
        found = told(model, shown, batch, reference, before)
        seen.append(float((found.reference - told(base, batch, batch).logits).abs().max()))
        return found

    monkeypatch.setattr(trainer, "said", compared)
    tune(words, tmp_path / "out")
    assert len(seen) == 6 and max(seen) < 1e-5


def test_a_calibration_file_decides_what_is_cut(tmp_path: Path) -> None:
    other = rows(tmp_path, [{"text": "other words " * (n + 1)} for n in range(6)], "other.jsonl")
    tune(corda(tmp_path), tmp_path / "own")
    tune(corda(tmp_path, calibration=str(other)), tmp_path / "given")
    rows(tmp_path, ROWS[:6], "same.jsonl")
    tune(corda(tmp_path, calibration=str(tmp_path / "same.jsonl")), tmp_path / "same")
    own, given, same = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("own", "given", "same")
    )
    assert own.keys() == given.keys() == same.keys()
    assert any(not torch.equal(own[name], given[name]) for name in own)
    assert all(torch.equal(own[name], same[name]) for name in own)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"samples": 25}, "24 rows are fewer than the 25 to calibrate on"),
        ({"rank": 33, "samples": 24}, "rank 33 is more than"),
        ({"use_rslora": True}, "unknown key 'use_rslora'"),
        ({"targets": ["q_porj"]}, "did you mean 'q_proj'?"),
        ({"calibration": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises((PlanError, SourceError)) as error:
        tune(corda(tmp_path, **given), tmp_path / "out")
    assert told in str(error.value)
    assert not (tmp_path / "out").exists()
