"""Pickled checkpoints: refused, or read as tensors and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

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


def pickled(folder: Path, tensors: Any, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / name)
    return folder


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        message = refusal(pickled(tmp_path / name, TENSORS, name))
        assert "--allow-pickle" in message and "save_pretrained" in message


def test_pickles_are_not_looked_at_beside_safetensors(tmp_path: Path) -> None:
    write_checkpoint(pickled(tmp_path, {"other": torch.ones(1)}), TENSORS)
    source = open_source(str(tmp_path), allow_pickle=True)
    assert "other" not in source
    assert source.unread == ("pytorch_model.bin",)


def test_pickles_are_read_as_if_they_were_safetensors(tmp_path: Path) -> None:
    tensors = {
        **TENSORS,
        "transposed": torch.randn(3, 5).T,
        "part": torch.randn(10)[2:7],
        "nothing": torch.zeros(0, 2),
        "truth": torch.tensor([True, False]),
    }
    source = open_source(str(pickled(tmp_path, tensors)), allow_pickle=True)
    assert [file.name for file in source.files] == ["model.safetensors"]
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor)
    offset = 0
    for info in source.files[0].tensors:
        assert info.offset == offset
        offset += info.nbytes
    into = bytearray(8)
    source.read_into("transposed", 4, memoryview(into))
    assert bytes(into) == tensors["transposed"].contiguous().numpy().tobytes()[4:12]


def test_sharded_pickles_take_the_names_of_safetensors(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    pickled(tmp_path, {"a": torch.ones(2)}, names[0])
    pickled(tmp_path, {"b": torch.zeros(2)}, names[1])
    content = {"weight_map": dict(zip("ab", names, strict=True))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    source = open_source(str(tmp_path), allow_pickle=True)
    expected = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.name for file in source.files] == expected
    assert source.index == {"weight_map": dict(zip("ab", expected, strict=True))}
    (tmp_path / names[1]).unlink()
    assert names[1] in refusal(tmp_path, allow_pickle=True)


def test_a_tied_head_in_a_pickle_is_kept_once(tmp_path: Path) -> None:
    embedding = torch.randn(4, 2)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "z": embedding}
    pickled(tmp_path, tensors)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    source = open_source(str(tmp_path), allow_pickle=True)
    assert list(source) == ["model.embed_tokens.weight", "z"]
    assert source.locate("lm_head.weight") == "model.embed_tokens.weight"
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    source = open_source(str(tmp_path), allow_pickle=True)
    assert list(source) == ["model.embed_tokens.weight", "lm_head.weight", "z"]
    assert torch.equal(source.tensor("lm_head.weight"), embedding)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    pickled(tmp_path / "model", {"a": Evil(tmp_path / "mark")})
    assert "none of it was run" in refusal(tmp_path / "model", allow_pickle=True)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": torch.ones(1), "step": 3}, "'step' is not a tensor"),
        ([torch.ones(1)], "no map from names to tensors"),
        ({"a": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.complex64"),
    ],
)
def test_a_pickle_of_other_things_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in refusal(pickled(tmp_path, content), allow_pickle=True)


def test_a_pickle_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    refusal(tmp_path, allow_pickle=True)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "before torch 1.6" in refusal(tmp_path, allow_pickle=True)


def test_a_state_dict_within_a_pickle_is_found(tmp_path: Path) -> None:
    pickled(tmp_path, {"state_dict": TENSORS, "epoch": 3}, "model.pt")
    assert set(open_source(str(tmp_path), allow_pickle=True)) == set(TENSORS)
