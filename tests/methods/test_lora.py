"""LoRA is AdamW over the factors of a product; its adapter is the trained model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft import merge
from mergekit_ft.deltas.putting import apply
from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.plan import ModelReference
from mergekit_ft.tuning import phases, trainer, tune
from tests.small_models import cli, hashes
from tests.tuned import Batch, mean_loss, model_of, plan, recorded, small_base

__all__ = ["recorded"]
TEXT = torch.arange(20, 52).view(2, 16)


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lora(home: Path, output: str = "adapter", objective: Any = "sft", **given: Any) -> Any:
    training = {k: given.pop(k) for k in list(given) if k not in LORA}
    return plan(home, {"lora": {"rank": 4, **given}}, objective=objective, **training) | {
        "output": output
    }


LORA = ("rank", "alpha", "dropout", "targets", "use_rslora", "use_dora", "init")


def by_peft(base: Path, folder: Path) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model_of(base), str(folder)).eval()
    with torch.no_grad():
        return model(TEXT).logits


def by_plan(base: Path, folder: Path) -> Tensor:
    """Return the logits of our own source of base and adapter."""
    named = ModelReference.model_validate({"model": str(base), "adapter": str(folder)})
    return open_speaker(named).read(TEXT, torch.ones_like(TEXT))


def test_lora_is_adamw_over_the_factors(tmp_path: Path, recorded: list[Batch]) -> None:
    words = lora(tmp_path, alpha=8.0, targets=["q_proj", "down_proj"], weight_decay=0.1)
    tune(words | {"training": words["training"] | {"steps": 1}}, tmp_path / "one")
    first = recorded.copy()
    recorded.clear()
    tune(words, tmp_path / "out")
    made = adapter(tmp_path / "out")
    assert torch.equal(first[0]["input_ids"], recorded[0]["input_ids"])
    again = by_hand(model_of(tmp_path / "base"), start_of(tmp_path), recorded[:6], 2.0)
    assert made.keys() == again.keys() and len(made) == 8
    assert max(float((made[name] - again[name]).abs().max()) for name in made) < 1e-6


def start_of(home: Path) -> dict[str, Tensor]:
    """Return the factors before a step, by peft's own draw from the plan's seed."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    found = get_peft_model_state_dict(get_peft_model(model_of(home / "base"), config))
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def by_hand(
    model: Any, factors: dict[str, Tensor], seen: list[Batch], scale: float
) -> dict[str, Tensor]:
    """Train B and A as AdamW is written, each weight of the model set to W + s B A."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(f), torch.zeros_like(f)) for name, f in factors.items()}
    for t, batch in enumerate(seen, 1):
        leaves = {name: f.clone().requires_grad_() for name, f in factors.items()}
        mixed = dict(weights)
        for name in leaves:
            if name.endswith("lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                product = leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
                mixed[f"{module}.weight"] = weights[f"{module}.weight"] + scale * product

        def run(*args: Any, mixed: dict[str, Tensor] = mixed, **kw: Any) -> Any:
            return torch.func.functional_call(model, mixed, args, kw)

        found = torch.autograd.grad(mean_loss(run, [batch]), list(leaves.values()))
        for (name, leaf), g in zip(leaves.items(), found, strict=True):
            m, v = (b * old + (1 - b) * new for b, old, new in _with(moments[name], g))
            moments[name] = (m, v)
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            factors[name] = (leaf - 1e-3 * (step + 0.1 * leaf)).detach()
    return factors


def _with(old: tuple[Tensor, Tensor], g: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    return [(0.9, old[0], g), (0.999, old[1], g * g)]


@pytest.mark.parametrize(
    "given", [{}, {"use_rslora": True, "alpha": 3.0}, {"use_dora": True, "init": "gaussian"}]
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_adapter_is_the_trained_model_by_peft_and_by_a_plan(
    given: dict[str, Any], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_base(tmp_path / "base", tied=tied)
    kept: list[Any] = []
    monkeypatch.setattr(phases.Phases, "train", _keeping(phases.Phases.train, kept))
    tune(lora(tmp_path, learning_rate=0.01, **given), tmp_path / "out")
    with torch.no_grad():
        wanted = kept[0].base.model.eval()(TEXT).logits
        base = model_of(tmp_path / "base")(TEXT).logits
    assert float((wanted - base).abs().max()) > 1e-3
    assert torch.allclose(by_peft(tmp_path / "base", tmp_path / "out"), wanted, atol=1e-5)
    assert torch.allclose(by_plan(tmp_path / "base", tmp_path / "out"), wanted, atol=1e-5)


def _keeping(train: Any, kept: list[Any]) -> Any:
    def wrapper(self: Any) -> Any:
        kept.append(self)
        before = {name: p.detach().clone() for name, p in self.base.parameters.items()}
        found = train(self)
        assert all(torch.equal(p, before[n]) for n, p in self.base.parameters.items())
        return found

    return wrapper


def test_a_gpt2_of_conv1d_is_adapted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tune(lora(tmp_path, learning_rate=0.01), tmp_path / "out")
    words = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert words["fan_in_fan_out"] is True
    assert words["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    one, other = (f(tmp_path / "base", tmp_path / "out") for f in (by_peft, by_plan))
    assert torch.allclose(one, other, atol=1e-5)


def test_full_and_delta_outputs_are_the_base_with_the_adapter_on_it(tmp_path: Path) -> None:
    small_base(tmp_path / "base", dtype=torch.bfloat16)
    for output, name in (("adapter", "a"), ("full", "f"), ("delta", "d.safetensors")):
        tune(lora(tmp_path, output, learning_rate=0.01), tmp_path / name)
    reference = {"model": str(tmp_path / "base"), "adapter": str(tmp_path / "a")}
    merge({"merge_method": "passthrough", "models": [reference]}, tmp_path / "merged")
    apply(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "on")
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not torch.equal(wanted[name], base[name]) for name in base)
    for made in ("f", "on"):
        found = load_file(tmp_path / made / "model.safetensors")
        assert all(
            found[name].dtype == torch.bfloat16 and torch.equal(found[name], wanted[name])
            for name in wanted
        )
    assert cli("verify", str(tmp_path / "f")).exit_code == 0


@pytest.mark.parametrize("given", [{"dropout": 0.3, "use_dora": True}, {"objective": "sft_kl"}])
def test_a_killed_training_goes_on_to_the_same_bytes(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = lora(tmp_path, save_every=2, schedule="cosine", clip=0.5, **given)
    words["training"]["gradient_checkpointing"] = "dropout" not in given
    tune(words, tmp_path / "whole")
    step = trainer.TuningTrainer._after_step
    done: list[int] = []

    def dying(self: Any, *args: Any) -> None:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(trainer.TuningTrainer, "_after_step", dying)
    with pytest.raises(KeyboardInterrupt):
        tune(words, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    tune(words, tmp_path / "broken", resume=True)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")


@pytest.mark.parametrize("name", ["asft", "sft_kl", "dpo"])
def test_the_reference_is_the_model_with_the_adapter_off(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = lora(tmp_path, objective=name, learning_rate=0.01)
    if name == "dpo":
        pairs = [{"prompt": f"{i} is", "chosen": " a", "rejected": " b"} for i in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    seen: list[float] = []
    base = model_of(tmp_path / "base").eval()
    told = trainer.said

    def compared(model: Any, shown: Any, batch: Any, reference: Any, before: Any) -> Any:
        assert reference is None and before is not None
        found = told(model, shown, batch, reference, before)
        plain = told(base, batch, batch)
        seen.append(float((found.reference - plain.logits).abs().max()))
        assert found.logits.requires_grad and not found.reference.requires_grad
        return found

    monkeypatch.setattr(trainer, "said", compared)
    tune(words, tmp_path / "out")
    assert len(seen) == 6 and max(seen) < 1e-5


def test_the_frozen_base_is_bfloat16_and_the_factors_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_base(tmp_path / "base", dtype=torch.bfloat16)
    kept: list[Any] = []
    monkeypatch.setattr(phases.Phases, "train", _keeping(phases.Phases.train, kept))
    tune(lora(tmp_path, precision="bfloat16"), tmp_path / "out")
    assert {p.dtype for p in kept[0].base.parameters.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapter(tmp_path / "out").values()} == {torch.float32}
    assert len(kept[0].trained.parameters) == len(adapter(tmp_path / "out"))


def test_a_target_that_matches_nothing_is_told_with_its_place(tmp_path: Path) -> None:
    small_base(tmp_path / "base")
    plan(tmp_path, "full")
    text = f"""\
base: {tmp_path / "base"}
data: {{train: {tmp_path / "rows.jsonl"}, rows: raw}}
tuner:
  lora:
    targets: [q_proj, k_porj]
"""
    result = cli("tune", "-", str(tmp_path / "out"), text=text)
    assert result.exit_code == 3
    told = (
        "plan:5:23: tuner: lora: 'k_porj' is no linear layer besides heads; did you mean 'k_proj'?"
    )
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_heads_are_left_out_and_globs_choose(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'lm_head' is no linear layer besides heads"):
        tune(lora(tmp_path, targets=["lm_head"]), tmp_path / "out")
    tune(lora(tmp_path, targets=["layers.1.mlp"]), tmp_path / "out")
    words = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    parts = ("down_proj", "gate_proj", "up_proj")
    assert words["target_modules"] == [f"model.layers.1.mlp.{part}" for part in parts]
    assert len(adapter(tmp_path / "out")) == 6


def test_an_adapter_tells_how_it_was_made_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    tune(lora(tmp_path, log_every=2), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "mergekit_ft.lock.json", "mergekit_ft.tune.yaml", "curves.json"} <= names
    receipt = json.loads((tmp_path / "out" / "mergekit_ft.lock.json").read_text())
    assert receipt["report"]["tuning"]["steps"] == 6
    assert receipt["outputs"]["adapter_model.safetensors"]["sha256"]
    assert {p.name for p in tmp_path.iterdir()} == {"base", "rows.jsonl", "out"}


def test_the_adapter_merges_in_a_plan(tmp_path: Path) -> None:
    tune(lora(tmp_path, learning_rate=0.01, alpha=8.0), tmp_path / "out")
    base = str(tmp_path / "base")
    words = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [
            {"model": base, "adapter": str(tmp_path / "out"), "parameters": {"weight": 0.5}}
        ],
    }
    merge(words, tmp_path / "merged")
    factors, before = adapter(tmp_path / "out"), load_file(f"{base}/model.safetensors")
    made = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = before[f"{name}.weight"] + 0.5 * 2.0 * (b @ a)
    assert math.isclose(float((made[f"{name}.weight"] - wanted).abs().max()), 0, abs_tol=1e-6)


def test_an_adapter_to_a_base_with_an_adapter_is_refused(tmp_path: Path) -> None:
    tune(lora(tmp_path, learning_rate=0.01), tmp_path / "one")
    words = lora(tmp_path) | {"base": f"{tmp_path / 'base'}+{tmp_path / 'one'}"}
    with pytest.raises(PlanError, match=re.escape("write `output: full` or `delta`")):
        tune(words, tmp_path / "two")
    tune(words | {"output": "full"}, tmp_path / "two")
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")


def test_an_adapter_that_learned_nothing_is_refused(tmp_path: Path) -> None:
    words = lora(tmp_path, steps=1, warmup=1)
    with pytest.raises(OperatorError, match="nothing was learned"):
        tune(words, tmp_path / "out")
    assert not (tmp_path / "out").exists()
