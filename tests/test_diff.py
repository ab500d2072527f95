"""`mergekit-ft diff`: what differs, what is only said to be equal where it is known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from mergekit_ft.cli import main
from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.inspection import diff as room
from mergekit_ft.inspection.diff import Asked, Diff, diff
from mergekit_ft.inspection.diff_text import lines, verdict
from mergekit_ft.inspection.differences import renames
from mergekit_ft.sources import TensorInfo, open_source
from tests.checkpoints import write_checkpoint

CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "rope": {"theta": 1}}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found = {"model.embed_tokens.weight": torch.randn(6, 4)}
    for i in range(3):
        found[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(8, 4)
        found[f"model.layers.{i}.norm.weight"] = torch.ones(4)
    return {name: value.to(dtype) for name, value in found.items()}


def model(folder: Path, tensors: dict[str, Tensor] | None = None, **options: Any) -> str:
    options = {"config": CONFIG} | options
    return str(write_checkpoint(folder, weights() if tensors is None else tensors, **options))


def command(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["diff", *words])
    return done.exit_code, done.stdout or done.output


def parts(made: Diff) -> dict[str, Any]:
    return {part: rows for part, rows in made.headers.items() if rows}


def test_headers_that_agree_say_nothing_of_weights(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in weights().items()}
    code, said = command(model(tmp_path / "a"), model(tmp_path / "b", other))
    assert code == 0
    assert said.splitlines()[-1] == (
        "headers and side files agree; weights not compared (--stats reads them)"
    )


def test_weights_that_differ_are_found_by_reading_them(tmp_path: Path) -> None:
    other = weights()
    other["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    code, said = command(model(tmp_path / "a"), model(tmp_path / "b", other), "--stats")
    assert code == 1
    assert said.splitlines()[-1] == (
        "headers and side files agree; 1 of 7 tensors differ, in 1 of 132 elements (0.758%)"
    )


def test_equal_weights_are_equal_when_they_were_read(tmp_path: Path) -> None:
    code, said = command(model(tmp_path / "a"), model(tmp_path / "b"), "--stats")
    assert code == 0
    assert said.splitlines()[-1] == (
        "headers and side files agree; all 7 tensors that both have are equal"
    )


def test_one_file_linked_twice_is_known_to_be_equal(tmp_path: Path) -> None:
    a = model(tmp_path / "a")
    shutil.copytree(a, tmp_path / "b", copy_function=os.link)
    made = diff(a, str(tmp_path / "b"))
    assert (made.weights, made.different) == ("equal", False)
    assert "the same files on disk" in verdict(made)


def merged(folder: Path, base: str) -> Path:
    from mergekit_ft.engine import merge

    merge(
        {"merge_method": "passthrough", "models": [{"model": base}]}, folder, allow_unchanged=True
    )
    return folder


def test_lock_files_tell_equal_weights_from_others_unread(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    moved = model(tmp_path / "moved", {name: value + 1 for name, value in weights().items()})
    one, same, other = (
        merged(tmp_path / name, of) for name, of in (("1", base), ("2", base), ("3", moved))
    )
    files = Asked(ignore=("files",))
    found = diff(str(one), str(same), files)
    assert (found.weights, found.different) == ("equal", False)
    assert "SHA-256" in verdict(found)
    found = diff(str(one), str(other), files)
    assert (found.weights, found.different) == ("different", True)


def test_a_lock_file_older_than_the_weights_is_not_gone_by(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    one, same = (merged(tmp_path / name, base) for name in "12")
    weights_file = same / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    later = weights_file.stat().st_mtime_ns + 10**9
    os.utime(weights_file, ns=(later, later))
    assert diff(str(one), str(same)).weights == "unknown"
    assert diff(str(one), str(same), Asked(stats=True)).weights == "different"


def test_every_kind_of_header_difference_is_named(tmp_path: Path) -> None:
    other = weights()
    other["model.layers.0.mlp.up_proj.weight"] = torch.zeros(9, 4, dtype=torch.bfloat16)
    other["model.layers.1.norm.weight"] = other["model.layers.1.norm.weight"].float()
    other["lm_head.weight"] = other.pop("model.embed_tokens.weight")
    config = CONFIG | {"rope": {"theta": 1.0}, "new": [1]}
    a = model(tmp_path / "a")
    b = model(tmp_path / "b", other, shards=2, config=config)
    (tmp_path / "b" / "notes.txt").write_text("x")
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    (tmp_path / "b" / "generation_config.json").write_text("{ }")
    found = parts(diff(a, b))
    assert found["shapes"] == [
        {"name": "model.layers.0.mlp.up_proj.weight", "a": [8, 4], "b": [9, 4]}
    ]
    assert found["dtypes"] == [{"name": "model.layers.1.norm.weight", "a": "BF16", "b": "F32"}]
    assert [(row["name"], row["only_in"]) for row in found["names"]] == [
        ("model.embed_tokens.weight", "A"),
        ("lm_head.weight", "B"),
    ]
    assert found["config"] == [
        {"name": "rope.theta", "a": 1, "b": 1.0},
        {"name": "new", "b": [1]},
    ]
    assert found["files"] == [
        {"name": "generation_config.json", "differs": True},
        {"name": "notes.txt", "only_in": "B"},
    ]
    assert [row["what"] for row in found["layout"]] == ["weight files", "index"]
    code, said = command(a, b, *(f"--ignore={part}" for part in found))
    assert (code, said.splitlines()[-1][:29]) == (0, "headers and side files agree;")


def test_a_tensor_of_another_name_is_suspected_where_only_one_fits() -> None:
    def infos(*names: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, "F32", shape, "f", 0, 16) for name in names}

    lost = infos("model.layers.0.q.weight", "model.layers.1.q.weight", "a.up.weight", "x.weight")
    new = infos("layers.0.q.weight", "layers.1.q.weight", "b.up.weight", "c.up.weight")
    new |= infos("x.bias", shape=(3,))
    assert renames(lost, new) == {
        "model.layers.0.q.weight": "layers.0.q.weight",
        "model.layers.1.q.weight": "layers.1.q.weight",
    }


def test_a_head_that_the_other_ties_is_said_to_be_tied(tmp_path: Path) -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    stored = weights() | {"lm_head.weight": weights()["model.embed_tokens.weight"]}
    a, b = model(tmp_path / "a", stored, config=tied), model(tmp_path / "b", config=tied)
    made = diff(a, b, Asked(stats=True))
    (row,) = made.headers["names"]
    assert (row["name"], row["tied_to"]) == ("lm_head.weight", "model.embed_tokens.weight")
    assert (made.weights, made.unread) == ("equal", [])


def tokenizer(folder: str, *tokens: str) -> None:
    content = {"model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(content))


def test_tokenizers_are_compared_token_by_token(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b")
    tokenizer(a, "x", "y", "z", "old")
    tokenizer(b, "y", "x", "z", "new", "more")
    assert parts(diff(a, b)) == {
        "tokenizer": [
            {"name": "tokenizer.json", "differs": True},
            {"what": "tokens only in A", "count": 1, "first": ["old"]},
            {"what": "tokens only in B", "count": 2, "first": ["new", "more"]},
            {"what": "tokens of another id", "count": 2, "first": ["x", "y"]},
        ]
    }
    (Path(b) / "tokenizer.json").write_text("{")
    assert "tokenizer of B cannot be read" in "\n".join(lines(diff(a, b), []))


def test_statistics_are_grouped_by_layer_and_family(tmp_path: Path) -> None:
    other = weights(torch.float32)
    for i in range(3):
        other[f"model.layers.{i}.norm.weight"] = torch.full((4,), 1.0 + i)
    a, b = model(tmp_path / "a", weights(torch.float32)), model(tmp_path / "b", other)
    made = diff(a, b, Asked(stats=True))
    stack = "model.layers"
    found = {key: totals.relative_norm for key, totals in made.groups().items() if "norm" in key}
    assert found == {(stack, "norm", i): float(i) for i in range(3)}
    norm = made.families()[stack, "norm", None]
    assert norm.relative_norm == pytest.approx((5 / 3) ** 0.5)  # (0 + 4 + 16) / (3 * 4)
    assert (norm.cosine, norm.largest) == (pytest.approx(24 / (12 * 56) ** 0.5), 2.0)
    assert (norm.changed_share, norm.sign_agreement) == (pytest.approx(2 / 3), 1.0)
    octave = 2**23
    steps = room.measures(norm)["ulp"]
    # from 1 to 2 is an octave, from 1 to 3 half of one more
    assert steps == [
        {"from": 0, "to": 0, "count": 4},
        {"from": octave // 2 + 1, "to": octave, "count": 4},
        {"from": octave + 1, "to": 2 * octave, "count": 4},
    ]


def test_budget_and_threads_move_no_bit(tmp_path: Path) -> None:
    torch.manual_seed(5)
    big = {"w": torch.randn(300_001), "v": torch.randn(70_000)}
    moved = {name: value * 1.001 for name, value in big.items()}
    a, b = model(tmp_path / "a", big), model(tmp_path / "b", moved)
    reports = []
    for threads, memory in ((1, 2**30), (3, 2**30), (2, 2**25)):
        made = diff(a, b, Asked(stats=True), threads=threads, memory=memory)
        reports.append(json.dumps(room.report(made, room.ranked(made.lines, "largest"))))
    assert len(set(reports)) == 1


def test_too_small_a_budget_is_refused(tmp_path: Path) -> None:
    a = model(tmp_path / "a")
    with pytest.raises(OperatorError, match="raise --memory or lower --threads"):
        diff(a, a, Asked(stats=True), memory=1000, threads=1)


def test_what_cannot_be_compared_is_named_and_the_rest_is_compared(tmp_path: Path) -> None:
    other = weights()
    other["model.layers.0.norm.weight"] = torch.ones(5, dtype=torch.bfloat16)
    del other["model.layers.1.norm.weight"]
    other["model.layers.2.norm.weight"][0] = float("nan")
    code, said = command(model(tmp_path / "a"), model(tmp_path / "b", other), "--stats", "--json")
    found = json.loads(said)
    assert code == 1
    assert sorted(found["stats"]["not_compared"]) == [
        "model.layers.0.norm.weight",
        "model.layers.1.norm.weight",
    ]
    rows = {row["name"]: row for row in found["stats"]["tensors"]}
    assert len(rows) == 5
    assert rows["model.layers.2.norm.weight"]["nan_b"] == 1
    assert any("NaN or Inf" in note for note in found["notes"])


def test_whole_numbers_count_as_changed_and_have_no_norm(tmp_path: Path) -> None:
    a = model(tmp_path / "a", {"w": torch.ones(2), "ids": torch.arange(6)})
    b = model(tmp_path / "b", {"w": torch.ones(2), "ids": torch.arange(6) // 2})
    made = diff(a, b, Asked(stats=True))
    total = made.families()["", "ids", None]
    assert (total.changed, total.floats) == (5, 0)
    assert made.different


def test_globs_choose_tensors_and_each_must_match(tmp_path: Path) -> None:
    other = weights()
    other["model.layers.1.norm.weight"] += 1
    a, b = model(tmp_path / "a"), model(tmp_path / "b", other)
    made = diff(a, b, Asked(stats=True, include=("*.norm.*",), exclude=("*.1.*",)))
    assert made.matches == {"--include *.norm.*": 3, "--exclude *.1.*": 2}
    assert (len(made.lines), made.weights) == (2, "equal")
    with pytest.raises(PlanError, match=r"--include 'nrm\*' matches no tensor"):
        diff(a, b, Asked(include=("nrm*",)))
    with pytest.raises(PlanError, match="leaves no tensor"):
        diff(a, b, Asked(include=("*.norm.*",), exclude=("*",)))


def test_tensors_are_ranked_by_what_was_asked(tmp_path: Path) -> None:
    other = weights(torch.float32)
    other["model.layers.0.norm.weight"] += 5
    other["model.layers.2.norm.weight"][0] += 9
    a, b = model(tmp_path / "a", weights(torch.float32)), model(tmp_path / "b", other)
    code, said = command(a, b, "--stats", "--sort", "largest", "--top", "1", "--json")
    assert code == 1
    (row,) = json.loads(said)["stats"]["tensors"]
    assert row["name"] == "model.layers.2.norm.weight"
    code, said = command(a, b, "--sort", "largest")
    assert code == 2
    assert "without --stats no weight is read" in said


def test_a_model_with_its_adapter_or_its_delta_is_a_model(tmp_path: Path) -> None:
    from mergekit_ft.deltas.extract import extract

    other = weights()
    other["model.layers.1.norm.weight"] += 1
    a, b = model(tmp_path / "a"), model(tmp_path / "b", other)
    extract(a, b, tmp_path / "d.safetensors")
    patched = f"{{model: {a}, delta: {tmp_path / 'd.safetensors'}}}"
    assert command(patched, b, "--stats")[0] == 0
    assert command(patched, a, "--stats")[0] == 1
    with open_source(a) as source:
        assert diff(patched, a).weights == "unknown", source
    code, said = command("{model: x, nonsense: y}", a)
    assert code == 3
    assert "unknown key 'nonsense'" in said


def test_names_that_would_write_on_a_terminal_are_written_out(tmp_path: Path) -> None:
    evil = {"w\x1b[31m\u202e": torch.ones(2)}
    a, b = model(tmp_path / "a", evil), model(tmp_path / "b")
    _, said = command(a, b)
    assert "\x1b" not in said
    assert "w\\u001b[31m\\u202e: only in A" in said


def test_quiet_prints_nothing_and_the_code_says_it(tmp_path: Path) -> None:
    a = model(tmp_path / "a")
    assert command(a, a, "--quiet") == (0, "")


def test_a_page_and_a_chart_are_written_of_what_was_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = weights()
    other["model.layers.1.norm.weight"] += 1
    other["lm_head.<b>.weight"] = torch.ones(2)
    a, b = model(tmp_path / "a"), model(tmp_path / "b", other)
    out, chart = tmp_path / "out.html", tmp_path / "out.svg"
    words = (a, b, "--stats", "--report", str(out), "--plot", str(chart), "--measure", "largest")
    assert command(*words, "--quiet") == (1, "")
    text = out.read_text()
    assert "lm_head.&lt;b&gt;.weight: only in B" in text
    assert "<b>.weight" not in text
    for part in ("Change by layer and module", "in steps of their dtype", "Tensors"):
        assert part in text
    assert "largest change" in chart.read_text()
    code, said = command(*words)
    assert (code, "exists; --overwrite replaces it" in said) == (6, True)
    assert command(*words, "--overwrite", "--quiet")[0] == 1
    assert out.read_text() == text


def test_a_page_of_headers_shows_what_headers_know(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b", config=CONFIG | {"x": "<i>"})
    out = tmp_path / "out.html"
    assert command(a, b, "--report", str(out), "--quiet")[0] == 1
    text = out.read_text()
    assert "x: absent in A, &lt;i&gt; in B" in text
    assert "weights not compared" in text
    assert "<table" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plot", "x.png"), "without --stats no weight is read"),
        (("--stats", "--measure", "cosine"), "--measure says what --plot draws"),
        (("--overwrite",), "is about the files of --report and --plot"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path: Path, words: Any, said: str) -> None:
    a = model(tmp_path / "a")
    code, printed = command(a, a, *words)
    assert (code, said in printed) == (2, True)


def test_a_map_sums_up_layers_and_families(tmp_path: Path) -> None:
    from mergekit_ft.inspection.diff_page import heat_maps

    other = weights(torch.float32)
    for i in range(3):
        other[f"model.layers.{i}.norm.weight"] = torch.full((4,), 1.0 + i)
    mine = weights(torch.float32)
    made = diff(model(tmp_path / "a", mine), model(tmp_path / "b", other), Asked(stats=True))
    (found,) = heat_maps(made)
    assert found.columns == ["all", "0", "1", "2"]
    assert found.rows == ["all of these", "mlp.up_proj", "norm", "model.embed_tokens"]
    largest = found.measure("largest change").values
    assert largest == [[2, 0, 1, 2], [0, 0, 0, 0], [2, 0, 1, 2], [0, None, None, None]]
    norms = [mine[f"model.layers.{i}.mlp.up_proj.weight"].double().square().sum() for i in range(3)]
    whole = ((0 + 4 + 16) / (float(sum(norms)) + 12)) ** 0.5
    last = (16 / (float(norms[2]) + 4)) ** 0.5
    relative = found.measure("relative norm").values[0]
    assert (relative[0], relative[3]) == (pytest.approx(whole), pytest.approx(last))
    turned = made.families()["model.layers", "norm", None]
    assert turned.turn == pytest.approx(1 - 24 / (12 * 56) ** 0.5)


MEASURED = """
import resource
from mergekit_ft.inspection.diff import Asked, diff

def highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

diff("a", "b", Asked(stats=True, include=("small",)), threads=2)
before = highest()
diff("a", "b", Asked(stats=True), threads=2, memory=32 * 2**20)
print(highest() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_statistics_stay_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    large = torch.ones(3 * 2**22, dtype=torch.bfloat16)  # 24 MiB, 192 blocks of the least size
    for name, value in (("a", large), ("b", 2 * large)):
        model(tmp_path / name, {"large": value, "small": torch.ones(9)})
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 32 + 4  # MiB; stacks and heaps of the threads
