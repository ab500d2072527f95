"""Headers as hostile input."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import open_source
from mergekit_ft.sources.dtypes import NAME, SIZE
from mergekit_ft.sources.files import FileReader
from mergekit_ft.sources.header import PREFIX, header_length, parse, read_file
from mergekit_ft.sources.source import Around, Source
from tests.checkpoints import write_checkpoint

TENSORS = {
    "model.embed_tokens.weight": torch.randn(7, 4),
    "model.layers.0.mlp.up_proj.weight": torch.randn(5, 4).to(torch.bfloat16),
    "model.layers.1.mlp.up_proj.weight": torch.randn(5, 4).to(torch.float16),
    "model.norm.weight": torch.randn(4).to(torch.float64),
    "model.steps": torch.tensor(3),
}


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def hostile(folder: Path, content: bytes) -> str:
    """Return the message with which a file is refused."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return refusal(folder)


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hundred_thousand_tensors_open_quickly(tmp_path: Path) -> None:
    header = {
        f"model.layers.{number // 300}.experts.{number}.weight": entry(
            "BF16", (1, 2), (4 * number, 4 * number + 4)
        )
        for number in range(100_000)
    }
    (tmp_path / "model.safetensors").write_bytes(raw(header, bytes(400_000)))
    begin = time.process_time()
    assert len(open_source(str(tmp_path))) == 100_000
    assert time.process_time() - begin < 3.0  # about 1 s


HEADERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes cannot hold a header"),
    "seven bytes": (b"1234567", "7 bytes cannot hold a header"),
    "a length beyond the file": (raw({}, length=100), "truncated: the header alone needs 108"),
    "a length beyond reason": (raw({}, length=2**63), "at most 100000000 are allowed"),
    "no JSON": (raw(b"{nonsense}"), "not JSON"),
    "a list": (raw(b"[1, 2]"), "not a JSON object"),
    "space before the object": (raw(b' {"a": 1}'), "not a JSON object"),
    "two objects": (raw(b"{}{}"), "not JSON"),
    "zeros after the object": (raw(b"{}\0\0"), "not JSON"),
    "other than UTF-8": (raw(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "half a character": (raw(b'{"\\ud800": {}}'), "half a character"),
    "deep nesting": (raw(b'{"a":' * 100_000), "not JSON"),
    "NaN": (raw(b'{"a": NaN}'), "NaN"),
    "a huge number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "the same name twice": (raw(b'{"a": {}, "a": {}}'), "names 'a' twice"),
    "metadata that is no map": (raw({"__metadata__": [1]}), "not a map of strings"),
    "metadata that is no string": (raw({"__metadata__": {"a": 1}}), "not a string: 'a'"),
    "an entry that is no object": (raw({"a": 3}), "tensor 'a' needs dtype"),
    "an entry without a shape": (raw({"a": {"dtype": "F32"}}), "tensor 'a' needs dtype"),
    "an entry with more": (raw({"a": {**entry(), "more": 1}}, bytes(4)), "and no more"),
    "an unknown dtype": (raw({"a": entry("F31")}, bytes(4)), "dtype 'F31', which is not supported"),
    "a dtype that is no word": (raw({"a": {**entry(), "dtype": []}}, bytes(4)), "not supported"),
    "a complex dtype": (raw({"a": entry("C64", (1,), (0, 8))}, bytes(8)), "'C64'"),
    "half a byte": (raw({"a": entry("F4", (2,), (0, 1))}, bytes(1)), "less than a byte"),
    "a negative extent": (raw({"a": entry("F32", (-1,))}, bytes(4)), "negative number: -1"),
    "a shape of floats": (raw({"a": entry("F32", (1.0,))}, bytes(4)), "whole numbers"),
    "a shape of truths": (raw({"a": entry("F32", (True,))}, bytes(4)), "whole numbers"),
    "a shape that is a word": (raw({"a": {**entry(), "shape": "1"}}, bytes(4)), "whole numbers"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "whole numbers"),
    "offsets backwards": (raw({"a": entry(offsets=(4, 0))}, bytes(4)), "before it begins at 4"),
    "another size than the shape": (
        raw({"a": entry("F32", (2,), (0, 4))}, bytes(4)),
        "F32 of shape [2] takes 8 bytes, its data_offsets hold 4",
    ),
    "a shape beyond counting": (
        raw({"a": entry("F32", (2**40, 2**40, 0), (0, 0))}),
        "more elements than can be",
    ),
    "an overlap": (
        raw({"a": entry(offsets=(0, 4)), "b": entry(offsets=(2, 6))}, bytes(6)),
        "'b' overlaps 'a'",
    ),
    "a tensor within another": (
        raw({"a": entry("F32", (3,), (0, 12)), "b": entry(offsets=(4, 8))}, bytes(12)),
        "'b' overlaps 'a'",
    ),
    "a hole": (
        raw({"a": entry(offsets=(0, 4)), "b": entry(offsets=(8, 12))}, bytes(12)),
        "a hole of 4 bytes between 'a' and 'b'",
    ),
    "a hole at the start": (raw({"a": entry(offsets=(4, 8))}, bytes(8)), "a hole of 4 bytes"),
    "fewer bytes than announced": (raw({"a": entry()}, bytes(3)), "truncated: "),
    "more bytes than announced": (raw({"a": entry()}, bytes(5)), "1 bytes after the last tensor"),
    "no tensor at all": (raw({}), "hold no tensors"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_refused_for(case: str, tmp_path: Path) -> None:
    content, expected = HEADERS[case]
    assert expected in hostile(tmp_path, content)


@pytest.mark.parametrize("case", HEADERS)
def test_what_the_formats_own_reader_refuses_is_refused_here_too(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[case][0])
    with pytest.raises(SourceError):
        open_source(str(tmp_path))
    stricter = {
        "a complex dtype",
        "half a byte",
        "an entry with more",
        "no tensor at all",
        "the same name twice",
    }
    if case not in stricter:
        with pytest.raises((SafetensorError, ValueError, OverflowError)):
            safe_open(path, "pt").__enter__()


def test_truncation_says_what_was_expected_and_what_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    whole = (tmp_path / "model.safetensors").read_bytes()
    message = hostile(tmp_path, whole[:-5])
    assert f"{len(whole)} bytes expected, the file has {len(whole) - 5}" in message
    assert str(tmp_path / "model.safetensors") in message


SOME_DTYPES = st.sampled_from(sorted(set(NAME) - {"BOOL"}))
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
ANY_FILE = st.dictionaries(NAMES, st.tuples(SOME_DTYPES, SHAPES), min_size=1, max_size=6)
IN_TMP = settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def made(content: dict[str, tuple[str, tuple[int, ...]]], order: random.Random) -> bytes:
    """Write a valid file with its tensors in any order of offset."""
    names, header, offset = list(content), {}, 0
    order.shuffle(names)
    for name in names:
        dtype, shape = content[name]
        count = SIZE[dtype]
        for extent in shape:
            count *= extent
        header[name] = entry(dtype, shape, (offset, offset + count))
        offset += count
    keys = list(header)
    order.shuffle(keys)
    text = json.dumps({key: header[key] for key in keys}, ensure_ascii=order.random() < 0.5)
    spaces = b" " * order.randrange(9)
    return raw(text.encode() + spaces, order.randbytes(offset))


@IN_TMP
@given(content=ANY_FILE, order=st.randoms(use_true_random=False))
def test_valid_files_read_as_the_formats_own_reader_reads_them(
    tmp_path: Path, content: dict[str, tuple[str, tuple[int, ...]]], order: random.Random
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(made(content, order))
    files = (read_file(path, path.name),)
    source, expected = Source(path.name, files, FileReader(files), Around()), load_file(path)
    assert set(source) == set(expected)
    for name, tensor in expected.items():
        mine = source.tensor(name)
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape
        assert torch.equal(mine.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@IN_TMP
@given(
    content=ANY_FILE,
    order=st.randoms(use_true_random=False),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(-3, 3),
)
def test_a_spoilt_header_is_refused_or_read_consistently(
    tmp_path: Path,
    content: dict[str, tuple[str, tuple[int, ...]]],
    order: random.Random,
    flips: list[tuple[int, int]],
    cut: int,
) -> None:
    spoilt = bytearray(made(content, order))
    end = PREFIX + int.from_bytes(spoilt[:PREFIX], "little")
    for place, value in flips:
        spoilt[place % end] = value
    spoilt = spoilt[:cut] if cut < 0 else spoilt + bytes(cut)
    path = tmp_path / "model.safetensors"
    path.write_bytes(spoilt)
    try:
        file = read_file(path, "model.safetensors")
    except SourceError:
        return
    here = file.tensors[0].offset if file.tensors else file.size
    for info in file.tensors:
        assert info.offset == here
        assert info.nbytes == info.numel * SIZE[info.dtype]
        here += info.nbytes
    assert here == file.size
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == {info.name for info in file.tensors}


@settings(deadline=None, max_examples=300)
@given(header=st.binary(max_size=200), size=st.integers(0, 400))
def test_any_bytes_are_refused_or_read(header: bytes, size: int) -> None:
    try:
        parse(header, size, "file", "file")
        parse(b"{" + header, size, "file", "file")
        header_length(header, size, "file")
    except SourceError:
        pass
