"""Which files make a checkpoint, and the ways in which they contradict one another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import open_source
from tests.checkpoints import write_checkpoint

TENSORS = {
    "model.embed_tokens.weight": torch.randn(7, 4),
    "model.layers.0.mlp.up_proj.weight": torch.randn(5, 4).to(torch.bfloat16),
    "model.layers.1.mlp.up_proj.weight": torch.randn(5, 4).to(torch.float16),
    "model.norm.weight": torch.randn(4).to(torch.float64),
    "model.steps": torch.tensor(3),
}


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def index_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return content


def with_index(folder: Path, **changes: Any) -> None:
    content = {**index_of(folder), **changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refusal(tmp_path)
    assert "1 of 3 shards that are missing: model-00002-of-00003.safetensors" in message


def test_missing_shards_without_an_index_are_numbered(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=3, index=False)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "number 2 of 3" in refusal(tmp_path)


def test_an_index_that_names_absent_tensors_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2)
    weight_map = index_of(tmp_path)["weight_map"]
    file = weight_map["model.norm.weight"]
    with_index(tmp_path, weight_map={**weight_map, "model.ghost.weight": file})
    assert f"model.ghost.weight ({file})" in refusal(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2)
    files = sorted(set(index_of(tmp_path)["weight_map"].values()), reverse=True)
    swapped = {
        name: files[0] if file == files[1] else files[1]
        for name, file in index_of(tmp_path)["weight_map"].items()
    }
    with_index(tmp_path, weight_map=swapped)
    assert "that their shards do not hold" in refusal(tmp_path)


def test_tensors_that_the_index_does_not_name_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2)
    weight_map = index_of(tmp_path)["weight_map"]
    del weight_map["model.norm.weight"]
    with_index(tmp_path, weight_map=weight_map)
    message = refusal(tmp_path)
    assert "its index does not name" in message and "model.norm.weight" in message


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/passwd", "a/../../evil", "C:\\evil", "C:/evil", "..\\evil", ""],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "in", TENSORS, shards=2)
    with_index(tmp_path / "in", weight_map={"model.norm.weight": name})
    assert "not a file within the checkpoint's folder" in refusal(tmp_path / "in")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_one_file_and_shards_side_by_side_are_refused(tmp_path: Path, index: bool) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2, index=index)
    write_checkpoint(tmp_path, TENSORS)
    message = refusal(tmp_path)
    assert "two models in one folder" in message and "remove" in message


def test_an_index_of_the_one_file_is_no_contradiction(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    content = {"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    assert len(open_source(str(tmp_path))) == len(TENSORS)


def test_the_only_file_is_the_model_whatever_its_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert len(open_source(str(tmp_path))) == len(TENSORS)
    shutil.copy(tmp_path / "consolidated.safetensors", tmp_path / "other.safetensors")
    message = refusal(tmp_path)
    assert "consolidated.safetensors, other.safetensors" in message


def test_files_beside_the_indexed_ones_are_named_as_unread(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2)
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    source = open_source(str(tmp_path))
    assert "other" not in source
    assert source.unread == ("consolidated.safetensors",)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"same": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert "tensor 'same' is in model-00001" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, TENSORS)
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "config.json: not" in refusal(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"compression_config": {"quant_method": "fp8"}},
    ],
)
def test_a_config_that_says_quantised_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, TENSORS, config=config)
    assert "quantised (fp8, by its config.json)" in refusal(tmp_path)


F8 = torch.ones(2, 2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"up.weight": F8, "up.weight_scale": torch.ones(1)}, "'up.weight_scale'"),
        ({"up.weight": F8, "up.weight_scale_inv": torch.ones(1)}, "'up.weight_scale_inv'"),
        ({"up.weight": F8, "up.scale_weight": torch.ones(1)}, "'up.scale_weight'"),
        ({"up.weight": F8.to(torch.int8), "up.weight_scale": torch.ones(1)}, "is I8"),
        ({"up_blocks": F8.view(torch.uint8), "up_scales": F8.view(torch.uint8)}, "'up_scales'"),
        ({"up.qweight": torch.ones(2, dtype=torch.int32)}, "GPTQ"),
        ({"up.weight": torch.ones(2), "up.weight.absmax": torch.ones(2)}, "bitsandbytes"),
        ({"up.weight_packed": torch.ones(2, dtype=torch.int32)}, "compressed-tensors"),
    ],
)
def test_weights_that_count_only_with_a_scale_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    write_checkpoint(tmp_path, tensors)
    message = refusal(tmp_path)
    assert expected in message
    assert "name the checkpoint it was quantised from" in message


def test_plain_float8_is_read(tmp_path: Path) -> None:
    source = open_source(str(write_checkpoint(tmp_path, {"up.weight": F8})))
    assert torch.equal(source.tensor("up.weight").float(), F8.float())
