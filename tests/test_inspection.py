"""What `inspect` and `check` say, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.inspection import check as checking
from mergekit_ft.inspection import headers, tables
from mergekit_ft.inspection.progress import Bar, Lines
from mergekit_ft.options import Options
from mergekit_ft.sources.files import FileReader
from tests.checkpoints import write_checkpoint

LAYERS = 3


def weights(dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS) -> dict[str, Tensor]:
    """Return a model of 16 + 3 * 12 + 4 + 16 = 72 parameters."""
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 4, dtype=dtype)}
    for i in range(layers):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = torch.zeros(2, 4, dtype=dtype)
        tensors[f"model.layers.{i}.norm.weight"] = torch.zeros(4, dtype=dtype)
    tensors["model.norm.weight"] = torch.zeros(4, dtype=dtype)
    tensors["lm_head.weight"] = torch.zeros(4, 4, dtype=dtype)
    return tensors


UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
TIED = {"model_type": "llama", "tie_word_embeddings": True}


def models(folder: Path, *names: str, **options: Any) -> list[str]:
    options = {"config": UNTIED} | options
    return [str(write_checkpoint(folder / name, weights(), **options)) for name in names]


def report(plan: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    found, resolution = checking.check(plan, Options(**{"threads": 2, **options}))
    return found, list(checking.lines(found, resolution))


def arithmetic(base: str, *tuned: str, **words: Any) -> dict[str, Any]:
    entries = [{"model": path, "parameters": {"weight": 0.5}} for path in tuned]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": entries, **words}


def test_inspect_counts_what_the_headers_hold(tmp_path: Path) -> None:
    (path,) = models(tmp_path, "a", shards=2)
    found = headers.inspect(path)
    assert found["parameters"] == 72
    assert found["bytes"] == 144
    assert found["tensor_count"] == 9
    assert found["dtypes"] == {"BF16": {"tensors": 9, "bytes": 144}}
    assert found["stacks"] == {
        "model.layers": {"layers": 3, "parameters": 36, "alike": True, "missing": []}
    }
    assert found["outside"] == {
        "embedding": ["model.embed_tokens.weight"],
        "norm": ["model.norm.weight"],
        "head": ["lm_head.weight"],
    }
    assert [file["tensors"] for file in found["files"]] == [4, 5]
    assert found["side_files"] == ["config.json"]
    assert found["ties"] == {}


def test_inspect_counts_a_tied_head_once(tmp_path: Path) -> None:
    (path,) = models(tmp_path, "a", config=TIED)
    found = headers.inspect(path)
    assert found["parameters"] == 56
    assert found["ties"] == {"lm_head.weight": {"to": "model.embed_tokens.weight", "stored": True}}
    assert any("lm_head.weight is tied to" in line for line in headers.lines(found))


def test_inspect_names_a_layer_that_is_missing_or_of_another_size(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.norm.weight"]
    tensors["model.layers.2.norm.weight"] = torch.zeros(9)
    found = headers.inspect(str(write_checkpoint(tmp_path / "a", tensors)))
    stack = found["stacks"]["model.layers"]
    assert (stack["missing"], stack["alike"]) == ([1], False)


def test_inspect_lists_every_tensor_unless_told_not_to(tmp_path: Path) -> None:
    (path,) = models(tmp_path, "a")
    lines = list(headers.lines(headers.inspect(path)))
    assert any(line.split() == ["model.norm.weight", "BF16", "4", "8", "B"] for line in lines)
    assert "tensors" not in headers.inspect(path, tensors=False)


def test_inspect_of_nothing_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        headers.inspect(str(tmp_path / "nowhere"))


def test_check_counts_tensors_and_bytes(tmp_path: Path) -> None:
    base, one, two = models(tmp_path, "base", "one", "two")
    found, lines = report(arithmetic(base, one, two))
    assert found["tensors"] == {"output": 9, "merged": 9, "copied": 0, "unused": {}}
    assert found["bytes"]["read"] == 3 * 144
    assert found["bytes"]["write"] == 144
    assert found["bytes"]["surveyed_tensors"] == 0
    assert found["bytes"]["surveys_over_model"] == []
    assert [source["roles"] for source in found["sources"]] == [
        ["base", "donor"],
        ["tuned"],
        ["tuned"],
    ]
    assert "bytes: 432 B to read, 144 B to write" in lines


def test_check_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileReader, "read_into", refuse)
    base, one = models(tmp_path, "base", "one")
    plan = arithmetic(base, one, then=[{"lines": {"alpha": "auto", "beta": 0.5}}])
    report(plan | {"merge_method": "ties"})


def test_check_tells_the_passes_that_surveys_need(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    plan = arithmetic(base, one, merge_method="ties", parameters={"density": 0.5})
    found, _ = report(plan)
    assert found["bytes"]["surveyed_tensors"] == 9
    assert found["bytes"]["read_by_surveys_at_least"] == 2 * 144
    found, lines = report(plan | {"parameters": {"density": 0.5, "scope": "model"}})
    assert found["bytes"]["surveys_over_model"] == ["ties"]
    assert "  before it, ties surveys the whole model" in lines


def test_check_tells_what_is_read_computed_in_and_stored(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    write_checkpoint(Path(one), weights(torch.float32), config=UNTIED)
    found, lines = report(arithmetic(base, one))
    assert "dtypes: BF16 + F32 -> float32 -> BF16, 9 tensors" in lines
    found, lines = report(arithmetic(base, one, dtype="float16"))
    assert [kind["stored"] for kind in found["dtypes"]] == ["F16"]


def test_check_names_tensors_that_are_not_used(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    extra = weights() | {"mtp.extra.weight": torch.zeros(2)}
    write_checkpoint(Path(one), extra, config=UNTIED)
    found, lines = report(arithmetic(base, one))
    assert found["tensors"]["unused"] == {one: ["mtp.extra.weight"]}
    assert any(line.startswith("note: ") and "mtp.extra.weight" in line for line in lines)


def test_check_notes_configs_that_differ_and_code_that_stays_behind(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    write_checkpoint(Path(one), weights(), config=UNTIED | {"rope_theta": 1e6})
    (tmp_path / "base" / "modeling_odd.py").write_text("")
    notes = report(arithmetic(base, one))[0]["notes"]
    assert f"rope_theta: not given in {base}, 1000000.0 in {one}" in notes
    assert any("modeling_odd.py" in note for note in notes)


def test_check_names_the_output_files(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one", shards=2)
    found, _ = report(arithmetic(base, one))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file["name"] for file in found["files"]] == names
    sizes = [(tmp_path / "base" / name).stat().st_size for name in names]
    assert [file["bytes"] for file in found["files"]] == sizes
    assert found["index"]
    assert found["side_files"] == ["config.json"]
    found, _ = report(arithmetic(base, one), max_shard_size=10**6)
    assert [file["name"] for file in found["files"]] == ["model.safetensors"]


def cells(found: dict[str, Any], parameter: str, model: str | None = None) -> dict[str, Any]:
    return {
        row["row"]: cell["values"]
        for row in found["parameters"]
        for cell in row["values"]
        if (cell["parameter"], cell["model"]) == (parameter, model)
    }


def test_check_shows_the_weights_of_each_layer(tmp_path: Path) -> None:
    base, one, two = models(tmp_path, "base", "one", "two")
    plan = arithmetic(base, one, two)
    plan["models"][0]["parameters"] = {
        "weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]
    }
    found, lines = report(plan)
    assert cells(found, "weight", one) == {
        "model.layers.0": [0.0, 0.25],
        "model.layers.1": [0.5, 0.25],
        "model.layers.2": [1.0, 0.25],
        "embedding": [0.25],
        "norm": [0.25],
        "head": [0.25],
    }
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    assert lines[head].split() == ["layer", "tensors", "weight", "one", "weight", "two"]
    assert lines[head + 2].split() == ["model.layers.1", "2", "0.5", "/", "0.25", "0.5"]


def test_check_says_once_what_holds_everywhere(tmp_path: Path) -> None:
    base, one, two = models(tmp_path, "base", "one", "two")
    _, lines = report(arithmetic(base, one, two))
    assert "  weight: one 0.5, two 0.5" in lines
    assert not any(line.split()[:1] == ["layer"] for line in lines)


def test_check_shows_the_factor_that_lines_gives_each_layer(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    step = {"lines": {"alpha": 0.25, "beta": 0.5, "norm": "last", "head": "keep"}}
    found, _ = report(arithmetic(base, one, then=[step]))
    assert cells(found, "lines factor") == {
        "model.layers.0": [0.25],
        "model.layers.1": [0.5],
        "model.layers.2": [0.75],
        "embedding": [0.25],
        "norm": [0.75],
        "head": [1.0],
    }


def test_check_estimates_memory_within_the_budget(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    big = {"model.layers.0.w.weight": torch.zeros(2048, 2048, dtype=torch.bfloat16)}
    for path in (base, one):
        write_checkpoint(Path(path), big, config=UNTIED)
    for budget in (2**26, 2**30):
        memory = report(arithmetic(base, one), memory=budget)[0]["memory"]
        assert memory["threads"] == 2
        assert 2 * 3 * 4 * 65_536 <= memory["peak"] <= budget  # base, tuned, output; float32


def test_check_refuses_a_budget_below_one_block(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    with pytest.raises(OperatorError, match="--memory"):
        report(arithmetic(base, one), memory=1000)


def test_check_reports_every_fault_at_once(tmp_path: Path) -> None:
    base, one = models(tmp_path, "base", "one")
    plan = arithmetic(base, one, modles="oops", parameters={"normalise": False})
    with pytest.raises(PlanError) as caught:
        report(plan)
    assert "modles" in str(caught.value) and "normalise" in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (24_900, "24.9 kB"),
        (1_073_741_824, "1.07 GB"),
        (4e15, "4,000 TB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_suits_them(nbytes: float, text: str) -> None:
    assert tables.size(nbytes) == text


def test_progress_off_a_terminal_is_a_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000))
    monkeypatch.setattr("mergekit_ft.inspection.progress.time.monotonic", lambda: next(clock))
    lines = Lines()
    lines.start(1000, "merging")
    for _ in range(1000):
        lines.advance(1)
    lines.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "merging: 1 kB to move"
    assert 2 <= len(said) <= 12
    assert said[1].startswith("10%, 1 B/s, ")


def test_the_bar_follows_what_moves_even_beyond_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = Bar()
    bar.advance(1)
    bar.close()
    bar.start(10, "merging")
    bar.advance(30)
    bar.close()
    assert "31.0/31.0" in capsys.readouterr().err
