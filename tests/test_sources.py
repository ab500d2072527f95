"""Checkpoints in folders: names, bytes, side files and references."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.dtypes import BY_NAME, CODE, FLOATING, NAME, SIZE, TORCH
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


@pytest.mark.parametrize(("shards", "index"), [(1, True), (3, True), (3, False)])
def test_a_folder_gives_names_shapes_dtypes_and_bytes(
    tmp_path: Path, shards: int, index: bool
) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=shards, index=index, config={"a": 1})
    with open_source(str(tmp_path)) as source:
        assert set(source) == set(TENSORS)
        assert len(source.files) == shards
        assert source.config == {"a": 1}
        assert source.folder == tmp_path and source.revision is None
        assert (source.index is not None) == (shards > 1 and index)
        for name, tensor in TENSORS.items():
            assert source[name].shape == tuple(tensor.shape)
            assert source[name].dtype == CODE[tensor.dtype]
            assert source[name].numel == tensor.numel()
            assert source.tensor(name).dtype == tensor.dtype
            assert torch.equal(source.tensor(name), tensor)


def test_the_layout_on_disk_is_told_file_by_file_in_order_of_offset(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2, metadata={"format": "pt", "of": "mine"})
    for file in open_source(str(tmp_path)).files:
        offsets = [info.offset for info in file.tensors]
        assert offsets == sorted(offsets)
        assert file.size == file.path.stat().st_size
        assert file.metadata == {"format": "pt", "of": "mine"}
        content = file.path.read_bytes()
        for info in file.tensors:
            data = content[info.offset : info.offset + info.nbytes]
            assert data == TENSORS[info.name].contiguous().reshape(-1).view(torch.uint8).numpy(
            ).tobytes()  # fmt: skip


@pytest.mark.parametrize("code", sorted(NAME))
def test_every_dtype_passes_through(tmp_path: Path, code: str) -> None:
    numbers = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(TORCH[code])
    tensors = {"some.tensor": numbers, "none.tensor": torch.zeros(0, 3).to(TORCH[code])}
    source = open_source(str(write_checkpoint(tmp_path, tensors)))
    assert source["some.tensor"].dtype == code
    assert source["some.tensor"].nbytes == 6 * SIZE[code]
    assert torch.equal(source.tensor("some.tensor").view(torch.uint8), numbers.view(torch.uint8))
    assert source.tensor("none.tensor").shape == (0, 3)


def test_the_tables_of_dtypes_agree_with_torch() -> None:
    for code, dtype in TORCH.items():
        assert SIZE[code] == dtype.itemsize
        assert (code in FLOATING) == dtype.is_floating_point
        assert CODE[dtype] == code
        assert f"torch.{NAME[code]}" == str(dtype)
        assert BY_NAME[NAME[code]] == code


def test_bytes_are_read_from_the_middle(tmp_path: Path) -> None:
    numbers = torch.arange(1000, dtype=torch.int32)
    source = open_source(str(write_checkpoint(tmp_path, {"numbers": numbers})))
    into = torch.zeros(10, dtype=torch.int32)
    source.will_need("numbers", 400, 40)
    source.read_into("numbers", 400, memoryview(into.numpy()))
    assert into.tolist() == list(range(100, 110))
    with pytest.raises(ValueError, match="4000 bytes"):
        source.read_into("numbers", 3990, memoryview(bytearray(11)))


def test_what_was_read_is_ones_own(tmp_path: Path) -> None:
    source = open_source(str(write_checkpoint(tmp_path, TENSORS)))
    source.tensor("model.norm.weight").zero_()
    assert torch.equal(source.tensor("model.norm.weight"), TENSORS["model.norm.weight"])


def test_descriptors_are_bounded_and_given_back(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": torch.full((64,), float(number)) for number in range(90)}
    write_checkpoint(tmp_path, tensors, shards=90)
    source = open_source(str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    wrong: list[str] = []

    def read() -> None:
        for name in random.sample(sorted(tensors), 90):
            if not torch.equal(source.tensor(name), tensors[name]):
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 32
        source.close()
        assert len(os.listdir("/proc/self/fd")) == before
    assert source.tensor("layers.3.weight")[0] == 3  # opened again


def test_reading_falls_back_to_seeking_where_there_is_no_preadv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(write_checkpoint(tmp_path, TENSORS)))
    monkeypatch.delattr(os, "preadv")
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_ft.sources import files

    monkeypatch.setattr(files, "LARGEST", 3)
    source = open_source(str(write_checkpoint(tmp_path, TENSORS)))
    assert torch.equal(source.tensor("model.norm.weight"), TENSORS["model.norm.weight"])


def test_side_files_are_all_that_is_not_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, shards=2, config={})
    for name in (
        "tokenizer.json",
        "LICENSE",
        ".gitattributes",
        "additional_chat_templates/tool.jinja",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "modeling_own.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "model.gguf",
        "onnx/model.onnx",
        ".git/config",
        "checkpoint-500/config.json",
        "checkpoint-500/model.safetensors",
        "original/consolidated.00.pth",
        "adapter_config.json",
        "adapter_model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    source = open_source(str(tmp_path))
    assert [path.as_posix() for path in source.side_files()] == [
        ".gitattributes",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "config.json",
        "modules.json",
        "tokenizer.json",
    ]
    assert [path.as_posix() for path in source.code_files()] == ["modeling_own.py"]
    others = ("adapter_model.safetensors", "model.gguf", "optimizer.pt", "pytorch_model.bin")
    assert source.unread == others


def test_a_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    before = open_source(str(tmp_path)).fingerprint()
    assert before == open_source(str(tmp_path)).fingerprint()
    assert before[0][:2] == ("model.safetensors", (tmp_path / "model.safetensors").stat().st_size)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert open_source(str(tmp_path)).fingerprint() != before


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    big = {"big": torch.ones(1 << 16), "last": torch.ones(1 << 16)}
    source = open_source(str(write_checkpoint(tmp_path, big)))
    source.tensor("big")
    os.truncate(tmp_path / "model.safetensors", 300_000)
    with pytest.raises(SourceError, match="truncated while it was being read"):
        source.tensor("last")
    source.close()
    with pytest.raises(SourceError, match="changed since its header was read"):
        source.tensor("big")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    source = open_source(str(write_checkpoint(tmp_path, TENSORS)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be opened: No such file"):
        source.tensor("model.norm.weight")


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_checkpoint(tmp_path / "a+b@c" / "model", TENSORS)
    assert len(open_source("~/a+b@c/model")) == len(TENSORS)


def test_references_that_are_nothing_are_refused(tmp_path: Path) -> None:
    for reference in ("", " ", "./nothing", str(tmp_path / "nothing"), "nothing", "a//b", "x\0y"):
        message = refusal(reference)
        assert "no such folder" in message or "not the name of a model" in message


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    assert "has no revision" in refusal(tmp_path, revision="main")


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf cannot be read" in refusal(tmp_path)


def test_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"lora_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "an adapter for org/base" in refusal(tmp_path)


def test_a_source_is_a_mapping_that_can_be_a_key(tmp_path: Path) -> None:
    source = open_source(str(write_checkpoint(tmp_path, TENSORS)))
    assert isinstance(source, Source)
    assert {source: 1}[source] == 1
    assert repr(source).endswith("5 tensors)")
