"""FP8 checkpoints are read as what they mean: each weight times its scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_ft import merge
from mergekit_ft.errors import MergekitError, SourceError
from mergekit_ft.inspection.check import check
from mergekit_ft.inspection.headers import inspect
from mergekit_ft.inspection.verify import verify
from mergekit_ft.options import Options
from mergekit_ft.sources import open_source
from tests.checkpoints import write_checkpoint

E4M3 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [2, 4]}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    words = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": words}},
        "ignore": ["lm_head"],
    }


def config(quantised: Any, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"model_type": "llama", "dtype": dtype, "quantization_config": quantised}


def eighths(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).to(E4M3)


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_scale_of_the_whole_tensor_multiplies_it(tmp_path: Path) -> None:
    tensors = {
        "up.weight": eighths([1.0, -2.0, 448.0], [0.5, 0.0, 3.5]),
        "up.weight_scale": torch.tensor([0.125]),
        "up.input_scale": torch.tensor([7.0]),
        "norm.weight": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
    }
    write_checkpoint(tmp_path, tensors, config=config(compressed("tensor")))
    source = open_source(str(tmp_path))
    assert list(source) == ["norm.weight", "up.weight"]
    assert source["up.weight"].dtype == "F32" and source["up.weight"].kept == "BF16"
    wanted = [[0.125, -0.25, 56.0], [0.0625, 0.0, 0.4375]]
    assert source.tensor("up.weight").tolist() == wanted
    assert source.tensor("norm.weight").dtype == torch.bfloat16
    assert any("up.input_scale" in note for note in source.notes)
    assert source.edits == {"quantization_config": None}


@pytest.mark.parametrize("shape", [(2, 1), (2,)])
@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8", "fp8"])
def test_a_scale_of_each_channel_multiplies_its_row(
    tmp_path: Path, shape: tuple[int, ...], method: str
) -> None:
    words = compressed("channel") if method[0] == "c" else {"quant_method": method}
    tensors = {
        "up.weight": eighths([1.0, 2.0, 4.0], [8.0, 16.0, 32.0]),
        "up.weight_scale": torch.tensor([0.5, 0.25], dtype=torch.bfloat16).view(shape),
    }
    write_checkpoint(tmp_path, tensors, config=config(words))
    read = open_source(str(tmp_path)).tensor("up.weight")
    assert read.tolist() == [[0.5, 1.0, 2.0], [2.0, 4.0, 8.0]]


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        (BLOCKS, "_scale_inv"),
        (compressed("block", block_structure=[2, 4]), "_scale"),
    ],
)
def test_a_scale_of_each_block_multiplies_it_and_blocks_at_the_edges_are_cut(
    tmp_path: Path, words: Any, ending: str
) -> None:
    tensors = {  # 3 x 6 in blocks of 2 x 4: the last row and the last two columns are cut
        "up.weight": torch.ones(3, 6).to(E4M3),
        "up.weight" + ending: torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    write_checkpoint(tmp_path, tensors, config=config(words))
    read = open_source(str(tmp_path)).tensor("up.weight")
    assert read.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 4, 4]]


def test_experts_fused_into_one_tensor_have_blocks_of_their_own(tmp_path: Path) -> None:
    tensors = {  # two experts of 3 x 4
        "experts.up_proj": torch.ones(2, 3, 4).to(E4M3),
        "experts.up_proj_scale_inv": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
    }
    write_checkpoint(tmp_path, tensors, config=config(BLOCKS))
    read = open_source(str(tmp_path)).tensor("experts.up_proj")
    assert read[:, :, 0].tolist() == [[1, 1, 2], [3, 3, 4]]


def test_any_range_of_bytes_is_the_same_as_the_whole(tmp_path: Path) -> None:
    weight, scale = torch.randn(300, 700).to(E4M3), torch.rand(3, 6) + 0.5
    tensors = {"up.weight": weight, "up.weight_scale_inv": scale}
    words = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = open_source(str(write_checkpoint(tmp_path, tensors, config=config(words))))
    tall = scale.repeat_interleave(128, 0)[:300]
    wanted = weight.float() * tall.repeat_interleave(128, 1)[:, :700]
    assert torch.equal(source.tensor("up.weight"), wanted)
    for start, stop in [(0, 4), (2799, 2801), (4 * 65_000, 4 * 66_000), (839_996, 840_000)]:
        data = bytearray(stop - start)
        source.read_into("up.weight", start, memoryview(data))
        assert bytes(data) == wanted.numpy().tobytes()[start:stop]


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path, value: float) -> None:
    tensors = {
        "up.weight": torch.ones(2, 2).to(E4M3),
        "up.weight_scale": torch.tensor([[1.0], [value]]),
    }
    write_checkpoint(tmp_path, tensors, config=config(compressed("channel")))
    with pytest.raises(SourceError, match=r"up.weight_scale holds .* at element 1"):
        open_source(str(tmp_path)).tensor("up.weight")


ONES = torch.ones(3, 6).to(E4M3)


@pytest.mark.parametrize(
    ("tensors", "words", "said"),
    [
        ({"up.weight": ONES}, BLOCKS, "FP8 without a scale: up.weight"),
        ({"up.weight_scale": torch.ones(1), "a.weight": ONES}, BLOCKS, "up.weight, which is mis"),
        ({"up.weight": ONES, "up.weight_scale_inv": torch.ones(2, 3)}, BLOCKS, "shape [2, 3]"),
        ({"up.weight": ONES, "up.weight_scale_inv": torch.ones(1)}, BLOCKS, "per block of 2x4"),
        (
            {"up.weight": ONES, "up.weight_scale": torch.ones(3, 1)},
            compressed("tensor"),
            "no scale of up.weight [3, 6] per tensor",
        ),
        (
            {"up.weight": torch.ones(3, 6), "up.weight_scale": torch.ones(1), "a.weight": ONES},
            compressed("tensor"),
            "up.weight_scale is a scale, but up.weight is F32",
        ),
        (
            {
                "up.weight": ONES,
                "up.weight_scale": torch.ones(1),
                "up.weight_scale_inv": torch.ones(1),
            },
            {"quant_method": "fp8"},
            "two scales",
        ),
        (
            {
                "up.weight": ONES,
                "up.weight_scale": torch.ones(1),
                "up.weight_zero_point": torch.ones(1),
            },
            compressed("tensor"),
            "up.weight_zero_point is not known",
        ),
        ({"up.weight": torch.ones(3, 6)}, BLOCKS, "none of its tensors is FP8"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], words: Any, said: str
) -> None:
    assert said in refusal(write_checkpoint(tmp_path, tensors, config=config(words)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"quant_method": "gptq"}, "quantised (gptq"),
        ({"quant_method": "awq"}, "quantised (awq"),
        ({"quant_method": "bitsandbytes"}, "quantised (bitsandbytes"),
        ({"quant_method": "hqq"}, "quantised (hqq"),
        ({"quant_method": "mxfp4"}, "quantised (mxfp4"),
        ({"quant_method": "modelopt"}, "quantised (modelopt"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 with experts in fp4"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "blocks are [128]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "blocks are [0, 128]"),
        (compressed("channel") | {"format": "pack-quantized"}, "pack-quantized"),
        (compressed("channel") | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (compressed("channel") | {"format": "int-quantized"}, "int-quantized"),
        (compressed("channel") | {"config_groups": {}}, "it has no config_groups"),
        (compressed("channel") | {"transform_config": {"a": 1}}, "sparse or transformed"),
        (compressed("channel", type="int"), "int of 8 bits"),
        (compressed("channel", num_bits=4), "float of 4 bits"),
        (compressed("group", group_size=32), "a scale for each group"),
        (compressed("channel", symmetric=False), "float of 8 bits"),
    ],
)
def test_other_quantisations_are_refused_by_name_with_the_way_out(
    tmp_path: Path, words: Any, said: str
) -> None:
    tensors = {"up.weight": ONES, "up.weight_scale": torch.ones(3, 1)}
    message = refusal(write_checkpoint(tmp_path, tensors, config=config(words)))
    assert said in message
    assert "name the checkpoint it was quantised from, or dequantise it first" in message


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return FP8 and a scale for each row, as compressed-tensors makes them."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(E4M3), scale


def written(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write a checkpoint of FP8 beside bfloat16; return what it means."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(6, 8, generator=generator) * 0.02
    head = torch.randn(5, 8, generator=generator).to(dtype)
    narrow, scale = quantised(up)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": narrow,
        "model.layers.0.mlp.up_proj.weight_scale": scale,
        "model.layers.0.mlp.up_proj.input_scale": torch.ones(1),
        "lm_head.weight": head,
    }
    write_checkpoint(folder, tensors, config=config(compressed("channel")), shards=2)
    up = narrow.float() * scale
    return {"model.layers.0.mlp.up_proj.weight": up, "lm_head.weight": head.float()}


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def plan(base: Path, *models: Path) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries}


def test_two_fp8_models_merge_as_what_they_mean_and_the_config_no_longer_says_fp8(
    tmp_path: Path,
) -> None:
    one, two = written(tmp_path / "a", 0), written(tmp_path / "b", 1)
    base = written(tmp_path / "base", 2)
    merge(plan(tmp_path / "base", tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    out = stored(tmp_path / "out")
    assert set(out) == set(base)
    for name, tensor in out.items():
        deltas = 0.5 * (one[name] - base[name]) + 0.5 * (two[name] - base[name])
        assert tensor.dtype == torch.bfloat16
        assert torch.allclose(tensor.float(), base[name] + deltas, rtol=2**-8, atol=1e-6)
    kept = json.loads((tmp_path / "out/config.json").read_text())
    assert kept == {"model_type": "llama", "dtype": "bfloat16"}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base)


def test_an_fp8_model_merges_into_a_plain_one(tmp_path: Path) -> None:
    tuned = written(tmp_path / "a", 0)
    plain = {name: torch.randn(tensor.shape) for name, tensor in tuned.items()}
    write_checkpoint(tmp_path / "base", plain, config={"model_type": "llama", "dtype": "float32"})
    merge(plan(tmp_path / "base", tmp_path / "a"), tmp_path / "out")
    for name, tensor in stored(tmp_path / "out").items():
        wanted = plain[name] + 0.5 * (tuned[name] - plain[name])
        assert torch.allclose(tensor, wanted, atol=1e-6)


def test_one_fp8_model_alone_is_dequantised_with_one_rounding(tmp_path: Path) -> None:
    meant = written(tmp_path / "a", 0)
    entry = {"model": str(tmp_path / "a"), "parameters": {"weight": 1.0}}
    merge({"merge_method": "linear", "models": [entry]}, tmp_path / "out")
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, meant[name].bfloat16())
    report = verify(tmp_path / "out", sample=None)
    assert not report["tensors"]["differ"] and not report["inputs"]["differ"]


def test_check_tells_what_is_dequantised_and_inspect_what_lies_on_disk(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        written(tmp_path / name, seed)
    report, _ = check(plan(tmp_path / "base", tmp_path / "a"), Options())
    notes = report["notes"]
    assert sum("1 FP8 tensors are dequantised as they are read" in note for note in notes) == 2
    assert sum("are left out (model.layers.0.mlp.up_proj.input_scale)" in n for n in notes) == 2
    assert "F8_E4M3" in inspect(str(tmp_path / "a"))["dtypes"]


def test_a_bad_scale_ends_the_run_without_an_output(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        written(tmp_path / name, seed)
    spoil(tmp_path / "a", "up_proj.weight_scale", lambda scale: scale.fill_(float("nan")))
    with pytest.raises(MergekitError, match="holds nan at element 0, which is no scale"):
        merge(plan(tmp_path / "base", tmp_path / "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil(folder: Path, ending: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = stored(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in tensors:
        if name.endswith(ending):
            change(tensors[name])
    write_checkpoint(folder, tensors)
