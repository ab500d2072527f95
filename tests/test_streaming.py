"""A model run layer by layer says what the whole model says, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mergekit_ft.models.opening import quiet
from mergekit_ft.models.shelf import Shelf
from mergekit_ft.models.streaming import Batch, Streamed
from mergekit_ft.sources import open_source

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**SIZES, "head_dim": 8, "sliding_window": 4}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama tied": ("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": 4}),
    "gemma": ("GemmaForCausalLM", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "neox": ("GPTNeoXForCausalLM", SIZES),
    "qwen2 moe": ("Qwen2MoeForCausalLM", {**SIZES, **MOE}),
}


def written(kind: str, folder: Path, **more: Any) -> Any:
    """Write a random model of a kind, and return it."""
    named, sizes = KINDS[kind]
    model_class = getattr(transformers, named)
    torch.manual_seed(1)
    with quiet():
        model = model_class(model_class.config_class(**{**sizes, **more})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.save_pretrained(folder)
    return model


def ragged() -> Batch:
    """Return three texts of different lengths, padded on the right."""
    dice = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 96, (3, 9), generator=dice)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    mask[2, 4:] = 0
    return Batch(tokens * mask, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path / "model")
    batches = [ragged(), Batch(ragged().tokens[:, :5])]
    rows, places = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 2, 1, 4])
    with quiet(), open_source(str(tmp_path / "model")) as source:
        found = list(Streamed(source).logits(batches, [(rows, places)] * 2))
    for batch, logits in zip(batches, found, strict=True):
        with torch.no_grad():
            whole = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
        torch.testing.assert_close(logits, whole[rows, places], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_a_layer_is_bit_for_bit_the_whole_models(kind: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path / "model")
    batch, seen = ragged(), {}
    with quiet(), open_source(str(tmp_path / "model")) as source:
        streamed = Streamed(source)
        path = f"{streamed.hollow.stack}.1"
        last = [name for name, _ in model.get_submodule(path).named_modules()][-1]
        wanted = f"{path}.{last}"
        states = streamed.run(
            [batch], upto=1, observe={wanted: lambda _, given: seen.update(streamed=given)}
        )
        held = [name for name, _ in streamed.hollow.resident() if path.rpartition(".")[0] in name]
    model.get_submodule(wanted).register_forward_pre_hook(
        lambda _, given: seen.update(whole=given[0])
    )
    model.get_submodule(path).register_forward_hook(
        lambda _, given, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    assert torch.equal(states.get(0), seen["out"])
    assert torch.equal(seen["streamed"], seen["whole"])
    assert not held


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = written("llama", tmp_path / "model")
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    most = []
    with quiet(), open_source(str(tmp_path / "model")) as source:
        streamed = Streamed(source)

        def note(number: int, given: Tensor) -> None:
            most.append(sum(p.numel() for _, p in streamed.hollow.resident()))

        paths = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
        streamed.run([ragged()], observe=dict.fromkeys(paths, note))
    assert most == [one + 32] * 3  # and the last norm


def test_a_tied_head_is_held_once(tmp_path: Path) -> None:
    written("llama tied", tmp_path / "model")
    with quiet(), open_source(str(tmp_path / "model")) as source:
        streamed = Streamed(source)
        streamed.fill_above(2)
        streamed.hollow.fill(streamed.hollow.within(streamed.hollow.embedding))
        assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight


def test_a_shelf_keeps_what_is_past_its_budget_in_a_file(tmp_path: Path) -> None:
    shelf = Shelf(budget=100, folder=tmp_path)
    tensors = [torch.randn(5, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16)] * 2
    for key, tensor in enumerate(tensors):
        shelf.put(key, tensor)
    shelf.put(3, tensors[1] + 1)
    assert shelf.held <= 100
    assert shelf.filed == 40 + 80 + 40
    for key, tensor in enumerate([*tensors[:3], tensors[1] + 1]):
        assert torch.equal(shelf.get(key), tensor)
    assert list(tmp_path.iterdir()) == []
    shelf.close()
