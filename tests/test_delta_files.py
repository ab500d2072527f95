"""The delta file: its indices, its header, and the writer that commits or leaves nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_ft.algebra.indices import WIDEST, coded, gaps, places, ungapped
from mergekit_ft.deltas.writing import DeltaWriter, Record, coding
from mergekit_ft.errors import SourceError, WriteError
from mergekit_ft.sources.delta_file import is_delta, open_delta

DOCUMENT = Path(__file__).parents[1] / "docs" / "delta-format.md"
HASH = "0" * 64
WORDS: dict[str, Any] = {
    "base": {"id": "org/base", "revision": None},
    "method": "by hand",
    "parameters": {},
    "density": None,
    "seed": None,
    "provenance": {},
}


def test_gaps_are_what_they_are_by_hand() -> None:
    indices = torch.tensor([0, 1, 5, 5 + WIDEST, 6 + 2 * WIDEST, 10**6])
    steps = [1, 1, 4, WIDEST, 0, 1]  # the last but one is one place beyond an escape
    left = 10**6 - (6 + 2 * WIDEST)  # 934,460 = 28 x 32,767 + 16,984
    assert gaps(indices).tolist() == [*steps, *([0] * 28), left - 28 * WIDEST]
    assert coded(indices) == len(steps) + 29


@pytest.mark.parametrize("share", [0.5, 0.01, 1e-5])
def test_gaps_lead_back_to_the_indices_in_runs_as_whole(share: float) -> None:
    rng = np.random.default_rng(7)
    indices = torch.from_numpy(np.flatnonzero(rng.random(3_000_000) < share))
    codes = gaps(indices)
    assert torch.equal(ungapped(codes), indices)
    before, found = -1, []
    for run in codes.split(1000):
        found.append(ungapped(run, before))
        before = int(places(run, before)[-1])
    assert torch.equal(torch.cat(found), indices)


def test_no_indices_are_no_codes() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert gaps(none).numel() == coded(none) == ungapped(gaps(none)).numel() == 0


def test_the_smaller_coding_is_taken() -> None:
    assert coding(100, 10, 10) == "gap16"
    assert coding(10**9, 300, 10) == "int32"
    assert coding(2**31 + 1, 300, 10) == "int64"


def written(path: Path, *, backwards: bool = False) -> Path:
    """Write a delta with a change of each kind that the documented reader handles."""
    runs: list[tuple[str, str, torch.Tensor]] = [
        ("w", "indices", gaps(torch.tensor([1, 4]))),
        ("w", "values", torch.tensor([10.0, 40.0])),
        ("w", "originals", torch.tensor([1.0, 4.0])),
        ("x", "indices", torch.tensor([0, 5], dtype=torch.int32)),
        ("x", "values", torch.tensor([0.5, -0.5])),
        ("head", "values", torch.full((2, 2), 7.0)),
        ("m", "a", torch.tensor([[1.0, 2.0, 3.0]])),
        ("m", "b", torch.tensor([[1.0], [10.0]])),
    ]
    records = [
        Record("w", "replace", "F32", (2, 3), HASH, 2, "gap16"),
        Record("x", "add", "F32", (6,), HASH, 2, "int32"),
        Record("head", "dense", "F32", (2, 2), None, 4, shapes={"values": (2, 2)}),
        Record(
            "m", "low_rank", "F32", (2, 3), HASH, 6, scale=2.0, shapes={"a": (1, 3), "b": (2, 1)}
        ),
    ]
    with DeltaWriter(path) as writer:
        for run in reversed(runs) if backwards else runs:
            writer.append(*run)
        writer.commit(WORDS, reversed(records) if backwards else records)
    return path


def test_a_delta_opens_as_it_was_written(tmp_path: Path) -> None:
    delta = open_delta(written(tmp_path / "d.safetensors"), "d")
    assert sorted(delta.changes) == ["head", "m", "w", "x"]
    change = delta.changes["w"]
    assert (change.kind, change.shape, change.coding, change.exact) == (
        "replace",
        (2, 3),
        "gap16",
        True,
    )
    assert not delta.changes["x"].exact
    assert delta.base == "org/base"
    assert is_delta(delta.path)


def test_the_bytes_do_not_depend_on_who_comes_first(tmp_path: Path) -> None:
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert written(one).read_bytes() == written(other, backwards=True).read_bytes()


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    with safe_open(written(tmp_path / "d.safetensors"), "pt") as file:
        assert file.get_tensor("w:values").tolist() == [10.0, 40.0]
        assert file.get_tensor("m:b").shape == (2, 1)


def test_the_documented_reader_reads_it(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[0]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 30
    space: dict[str, Any] = {}
    exec(code, space)
    words, parts = space["read"](written(tmp_path / "d.safetensors"))
    bases = {"w": np.arange(6, dtype="<f4").reshape(2, 3), "x": np.ones(6, dtype="<f4")}
    bases["m"], bases["head"] = np.zeros((2, 3), dtype="<f4"), None
    made = {
        name: space["change"](name, record, parts, bases[name]).tolist()
        for name, record in words["tensors"].items()
    }
    assert made == {
        "w": [[0, 10, 2], [3, 40, 5]],
        "x": [1.5, 1, 1, 1, 1, 0.5],
        "head": [[7, 7], [7, 7]],
        "m": [[2, 4, 6], [20, 40, 60]],
    }


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"), DeltaWriter(tmp_path / "d.safetensors") as w:
        w.append("w", "values", torch.ones(3))
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_a_delta_that_exists_is_kept_unless_told(tmp_path: Path) -> None:
    path = written(tmp_path / "d.safetensors")
    before = path.read_bytes()
    with pytest.raises(WriteError, match="exists; give --overwrite"), DeltaWriter(path):
        pass
    assert path.read_bytes() == before
    with DeltaWriter(path, overwrite=True):
        pass  # nothing committed
    assert path.read_bytes() == before


def test_a_delta_needs_a_name_that_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="ends in"):
        DeltaWriter(tmp_path / "delta.bin")


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write the file anew with other words in its metadata."""
    with safe_open(path, "pt") as file:
        words = json.loads(file.metadata()["delta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(words)
    save_file(tensors, path, {"format": "mergekit-ft delta", "delta": json.dumps(words)})
    return path


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(words: dict[str, Any]) -> None:
        for key in keys[:-1]:
            words = words[key]
        words[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("version", to=9), "is a delta file of version 9"),
        (_set("version", to="1"), "says no version"),
        (_set("colour", to=1), "has `colour`"),
        (lambda words: words.pop("base"), "lacks `base`"),
        (lambda words: words["tensors"].pop("x"), "2 of its tensors have no record: x:"),
        (_set("tensors", to={}), "changes no tensor"),
        (_set("tensors", "w", "kind", to="mystery"), "kind 'mystery' is not known"),
        (_set("tensors", "w", "kind", to="dense"), "cannot have indices coded"),
        (_set("tensors", "w", "kind", to="add"), "a change of kind add has indices, values"),
        (_set("tensors", "w", "entries", to=3), "its values are [2], where the record says [3]"),
        (_set("tensors", "x", "entries", to=7), "7 entries in a tensor of 6"),
        (_set("tensors", "w", "coding", to="int32"), "indices coded as int32 are flat I32"),
        (_set("tensors", "w", "dtype", to="BF16"), "values of F32 replace entries of BF16"),
        (_set("tensors", "w", "sha256", to=None), "SHA-256 of the base tensor is not recorded"),
        (_set("tensors", "w", "sha256", to="abc"), "no SHA-256 in hexadecimal"),
        (_set("tensors", "m", "shape", to=[3, 2]), "b @ a is [2, 3], the tensor [3, 2]"),
        (_set("tensors", "head", "shape", to=[4]), "its values are F32 [2, 2]"),
        (_set("tensors", "w", to={}), "its record needs coding, dtype"),
        (_set("scales", to=[1.0]), "names 0 tasks and 1 scales"),
    ],
)
def test_a_header_that_disagrees_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    path = rewritten(written(tmp_path / "d.safetensors"), change)
    with pytest.raises(SourceError, match=re.escape(told)):
        open_delta(path)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    def change(words: dict[str, Any]) -> None:
        words["tensors"]["w"]["dtype"] = "BF16"
        words["tensors"]["m"]["shape"] = [3, 2]

    with pytest.raises(SourceError, match=r"(?s)m: b @ a.*; w: values of F32|w:.*; m:"):
        open_delta(rewritten(written(tmp_path / "d.safetensors"), change))


def test_another_file_is_no_delta_and_told_what_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert not is_delta(path)
    with pytest.raises(SourceError, match="delta extract"):
        open_delta(path)
