"""The half reset: which tensors go back to the base, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekit_ft
from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.layers import places
from mergekit_ft.methods.hft_reset import HftReset
from mergekit_ft.plan import read
from mergekit_ft.stages import resolve
from tests.checkpoints import tiny_gpt2, tiny_llama, write_checkpoint
from tests.merging import Case
from tests.tuned import plan, trained

BLOCK = [
    *(f"self_attn.{word}_proj" for word in "qkvo"),
    *(f"mlp.{word}_proj" for word in ("up", "gate", "down")),
    "input_layernorm",
    "post_attention_layernorm",
]
BESIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def names(layers: int) -> list[str]:
    return [f"model.layers.{i}.{word}.weight" for i in range(layers) for word in BLOCK] + BESIDE


def reset(held: list[str], seed: int = 0) -> set[str]:
    operator = HftReset(seed=seed).seated(places(held))
    where = places(held)
    return {name for name in held if operator.copies(1, name, where[name]) == -1}


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def words(base: Path, tuned: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "hft_reset",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": parameters,
    }


@pytest.mark.parametrize("layers", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", [0, 1, 9])
def test_of_each_block_two_attention_matrices_and_a_norm_go_back(layers: int, seed: int) -> None:
    gone = reset(names(layers), seed)
    feed_forward = []
    for layer in range(layers):
        mine = [name for name in gone if f"layers.{layer}." in name]
        assert sum("self_attn" in name for name in mine) == 2
        assert sum("norm" in name for name in mine) == 1
        feed_forward.append(sum("mlp" in name for name in mine))
    # one matrix goes back where two train: in half of the blocks, rounded down
    assert sorted(feed_forward) == [1] * (layers // 2) + [2] * (layers - layers // 2)
    assert not gone & set(BESIDE)


def test_seeds_draw_different_halves() -> None:
    assert len({frozenset(reset(names(4), seed)) for seed in range(8)}) == 8


def test_a_tensor_comes_out_as_one_model_has_it_bit_for_bit(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", seed=1, dtype=torch.bfloat16, shards=2)
    tuned = tiny_llama(tmp_path / "tuned", seed=2, dtype=torch.bfloat16)
    result = mergekit_ft.merge(words(base, tuned, seed=3), tmp_path / "out")
    with mergekit_ft.open_plan({**words(tuned, tuned), "merge_method": "passthrough",
                                "base_model": None, "parameters": {}}) as theirs:  # fmt: skip
        other = {name: theirs[name] for name in theirs}
    mine: dict[str, Tensor] = {}
    back: dict[str, Tensor] = {}
    for file in base.glob("*.safetensors"):
        back |= load_file(file)
        mine |= load_file(tmp_path / "out" / file.name)
    gone = reset(sorted(back), 3)
    assert gone
    for name, tensor in mine.items():
        assert same(tensor, back[name] if name in gone else other[name]), name
    share = sum(back[n].numel() for n in gone) / sum(t.numel() for t in back.values())
    noted = next(note for note in result.notes if "taken as they are" in note)
    assert f"{share:.1%} {base}" in noted and f"{1 - share:.1%} {tuned}" in noted


def test_resetting_what_hft_made_by_the_same_seed_changes_nothing(tmp_path: Path) -> None:
    made = trained(plan(tmp_path, "hft", seed=5), tmp_path / "out")
    mergekit_ft.merge(words(tmp_path / "base", tmp_path / "out", seed=5), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(same(again[name], tensor) for name, tensor in made.items())
    mergekit_ft.merge(words(tmp_path / "base", tmp_path / "out", seed=6), tmp_path / "other")
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not all(same(other[name], tensor) for name, tensor in made.items())


def test_a_model_that_equals_its_base_is_refused_for_nothing_would_change(tmp_path: Path) -> None:
    base, twin = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "twin")
    with mergekit_ft.open_plan(words(base, twin)) as merged:
        back = load_file(base / "model.safetensors")
        assert all(same(merged[name], tensor) for name, tensor in back.items())
    with pytest.raises(OperatorError):
        mergekit_ft.merge(words(base, twin), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_alone_is_no_model_to_reset(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    with pytest.raises(PlanError, match="model"):
        mergekit_ft.merge(words(base, base), tmp_path / "out")


def test_biases_go_with_their_matrices_and_buffers_count_for_nothing(tmp_path: Path) -> None:
    base, tuned = tiny_gpt2(tmp_path / "a", seed=1), tiny_gpt2(tmp_path / "b", seed=2)
    with mergekit_ft.open_plan(words(base, tuned)) as merged:
        plain = {name: merged[name] for name in merged}
    mask = {
        f"transformer.h.{i}.attn.{word}": torch.zeros(1)
        for i in range(2)
        for word in ("bias", "masked_bias")
    }
    for folder in (base, tuned):
        held = load_file(folder / "model.safetensors") | mask
        write_checkpoint(folder, held)
    with mergekit_ft.open_plan(words(base, tuned)) as merged:
        assert all(same(merged[name], tensor) for name, tensor in plain.items())
    back = load_file(base / "model.safetensors")
    for name in (name for name in plain if name.endswith(".bias") and ".h." in name):
        weight = name.removesuffix("bias") + "weight"
        # zeros and ones are what transformers starts biases and norms with: told by the weight
        if "ln_" not in name:
            assert same(plain[name], back[name])
            assert weight in plain


def test_stacked_layers_are_drawn_as_they_stand_in_the_output(tmp_path: Path) -> None:
    base, tuned = tiny_llama(tmp_path / "a", seed=1), tiny_llama(tmp_path / "b", seed=2)
    sources = [{"model": str(m), "layer_range": [0, 2]} for m in (base, tuned)]
    stacked = {
        "merge_method": "hft_reset",
        "base_model": str(base),
        "slices": [{"sources": sources}, {"sources": sources}],
    }
    found = resolve(read(stacked))
    gone = {task.name for task in found.tasks if task.copy is task.base}
    assert gone == reset([task.name for task in found.tasks])
    found.close()


def test_what_goes_back_has_no_delta_for_operators_that_follow() -> None:
    held = names(2)
    operator, where = HftReset().seated(places(held)), places(held)
    gone = reset(held)
    for name in held:
        case = Case(operator, [1.0, -0.0, 2.0], [1.5, 0.0, 2.0], name=name, place=where[name])
        assert case.merged().tolist() == ([0, 0, 0] if name in gone else [0.5, 0.0, 0.0])
        assert torch.equal(case.merged().double(), case.reference())


def test_lines_after_it_scales_what_stayed(tmp_path: Path) -> None:
    base, tuned = tiny_llama(tmp_path / "a", seed=1), tiny_llama(tmp_path / "b", seed=2)
    halved = {**words(base, tuned), "then": [{"lines": {"alpha": 0.5, "beta": 0.0}}]}
    with mergekit_ft.open_plan(halved) as merged:
        out = {name: merged[name] for name in merged}
    back, other = (load_file(m / "model.safetensors") for m in (base, tuned))
    gone = reset(list(back))
    for name in (name for name in out if ".layers." in name):
        half = back[name] if name in gone else back[name] + 0.5 * (other[name] - back[name])
        assert torch.allclose(out[name].float(), half, atol=1e-6), name
