"""A model with an adapter on it is what peft makes of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft.sources import Source, adapted, open_adapter, open_source
from tests.checkpoints import tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, on what it saves
LAYERS = ["q_proj", "down_proj"]


def trained(base: Path, folder: Path, **words: Any) -> dict[str, Tensor]:
    """Save an adapter of random weights for a model; return what peft makes of the two."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    masked = AutoConfig.from_pretrained(base).model_type == "bert"
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model: Any = kind.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **words}))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    model = kind.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def on(base: Path, folder: Path, **opening: Any) -> Source:
    return adapted(open_source(str(base)), open_adapter(str(folder), **opening))


def require_same(source: Source, wanted: dict[str, Tensor], plain: Source) -> set[str]:
    """Compare with peft's; return the names of the tensors that changed."""
    changed = set()
    for name in source:
        mine = source.tensor(name)
        assert mine.shape == wanted[name].shape
        assert float((mine - wanted[name]).abs().max()) <= 1e-6 * max(1, float(mine.abs().max()))
        if not torch.equal(mine, plain.tensor(name)):
            changed.add(name)
    return changed


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ({"target_modules": LAYERS}, 4),
        ({"target_modules": LAYERS, "use_rslora": True}, 4),
        ({"target_modules": LAYERS, "use_dora": True}, 4),
        ({"target_modules": "all-linear", "use_dora": True, "use_rslora": True}, 14),
        (
            {
                "target_modules": LAYERS,
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
                "alpha_pattern": {r"model\.layers\.0\..*": 12, "down_proj": 3},
            },
            4,
        ),
        (
            {"target_modules": LAYERS, "use_rslora": True, "rank_pattern": {"^model.*q_proj": 8}},
            4,
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, 8),
        ({"target_modules": ["embed_tokens"]}, 1),
        ({"target_modules": ["embed_tokens", "lm_head", "v_proj"]}, 4),
        ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, 3),
        ({"target_modules": LAYERS, "layers_to_transform": [1]}, 2),
        ({"target_modules": LAYERS, "init_lora_weights": "orthogonal"}, 4),
        ({"target_modules": LAYERS, "init_lora_weights": "gaussian"}, 4),
    ],
)
def test_a_llama_with_an_adapter_is_pefts(
    tmp_path: Path, words: dict[str, Any], changes: int
) -> None:
    base = tiny_llama(tmp_path / "base")
    wanted = trained(base, tmp_path / "adapter", **words)
    source = on(base, tmp_path / "adapter")
    assert len(require_same(source, wanted, open_source(str(base)))) == changes
    assert any(f"changes {changes} of {len(source)} tensors" in note for note in source.notes)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ({"target_modules": ["query", "dense"]}, 9),
        ({"target_modules": ["query"], "bias": "lora_only"}, 4),
        ({"target_modules": ["query"], "bias": "all"}, None),
        ({"target_modules": ["query", "dense"], "lora_bias": True}, 18),
        ({"target_modules": ["query"], "bias": "all", "lora_bias": True}, None),
        ({"target_modules": ["query", "dense"], "use_dora": True, "bias": "lora_only"}, 18),
    ],
)
def test_a_bert_with_an_adapter_and_biases_is_pefts(
    tmp_path: Path, words: dict[str, Any], changes: int | None
) -> None:
    base = tiny_bert(tmp_path / "base")
    wanted = trained(base, tmp_path / "adapter", **words)
    changed = require_same(on(base, tmp_path / "adapter"), wanted, open_source(str(base)))
    assert len(changed) == changes if changes else len(changed) > 10


@pytest.mark.parametrize("words", [{}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}])
@pytest.mark.parametrize("modules", [["c_attn", "c_proj"], ["c_proj"]])
def test_a_gpt2_with_an_adapter_is_pefts_its_weights_transposed(
    tmp_path: Path, words: dict[str, Any], modules: list[str]
) -> None:
    base = tiny_gpt2(tmp_path / "base")  # attn.c_proj is square
    wanted = trained(base, tmp_path / "adapter", target_modules=modules, **words)
    assert require_same(on(base, tmp_path / "adapter"), wanted, open_source(str(base)))
