"""Commit or nothing: out of order, interrupted, crowded, resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mergekit_ft import engine, writer
from mergekit_ft.checkpoint import sides
from mergekit_ft.errors import OperatorError, WriteError
from mergekit_ft.sources.sides import RECEIPT
from mergekit_ft.writer import JOURNAL, Writer
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, NAMES, arithmetic, cli, hashes, three, weights

PLAN = three("ties", "weight: 0.6, density: 0.5", "then:\n  - lines: {alpha: auto, beta: 0.5}\n")
WRITES = 15  # of PLAN over these models: 12 tensors, of which one takes four blocks


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with ./base, ./maths and ./chat, in two shards; one tensor has 4 cells."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        made = weights(seed)
        made["lm_head.weight"] = weights(seed, width=512)["model.layers.0.self_attn.q_proj.weight"]
        write_checkpoint(tmp_path / name, made, config=CONFIG, shards=2)
    monkeypatch.setattr(writer, "BATCH", 1)  # every tensor is noted at once
    return tmp_path


def merge(plan: str = PLAN, out: str = "same/out", **options: Any) -> dict[str, str]:
    """Merge in blocks of one cell; return the hashes of what came out."""
    engine.merge(plan, out, **{"memory": 6 << 20, "threads": 1, **options})
    return hashes(out)


def undisturbed() -> dict[str, str]:
    """Return the hashes of a run that nothing disturbs, and leave nothing behind."""
    found = merge()
    shutil.rmtree("same")
    return found


def strike(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, error: BaseException
) -> None:
    """Make the n-th call of a function raise, once."""
    calls, original = iter(range(1, 10**6)), getattr(where, name)

    def struck(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(*given, **named)

    monkeypatch.setattr(where, name, struck)


@pytest.mark.parametrize("number", [1, 2, 7, WRITES - 1, WRITES])
@pytest.mark.parametrize("error", [WriteError("disk on fire"), KeyboardInterrupt()])
def test_a_run_that_stops_at_any_write_is_resumed_to_the_same_bytes(
    number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed()
    with monkeypatch.context() as patch:
        strike(patch, Writer, "write", number, error)
        with pytest.raises(type(error)):
            merge()
    assert not Path("same/out").exists()
    lines = Path("same/out.part", JOURNAL).read_text().splitlines()
    noted = {entry.get("tensor") for entry in map(json.loads, lines)} - {None}
    assert (number > 1) == bool(noted)
    written: list[str] = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *g: (written.append(g[1]), write(*g))[1])
    assert merge(resume=True) == expected
    assert set(written) == set(weights(0)) - noted
    assert not Path("same/out.part").exists()


def test_a_run_that_stops_at_every_write_gets_there_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = undisturbed()
    for _ in range(WRITES):
        with monkeypatch.context() as patch:
            strike(patch, Writer, "write", 5, KeyboardInterrupt())
            try:
                found = merge(resume=True)
                break
            except KeyboardInterrupt:
                assert not Path("same/out").exists()
    assert found == expected


LATE: list[tuple[Any, str, int]] = [
    (sides, "_put", 1),  # before the side files
    (writer.Writer, "_write_receipt", 1),  # before the receipt
    (Path, "replace", 1),  # the receipt is a draft
    (Path, "unlink", 1),  # the receipt is there, and the journal
    (writer, "_sync_folder", 1),  # all is there but the name
    (Path, "rename", 1),
]


@pytest.mark.parametrize(("where", "name", "number"), LATE, ids=[late[1] for late in LATE])
def test_a_run_that_is_killed_on_its_last_steps_is_resumed_to_the_same_bytes(
    where: Any, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed()
    with monkeypatch.context() as patch:
        strike(patch, where, name, number, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge()
    assert not Path("same/out").exists()
    monkeypatch.setattr(Writer, "write", None)  # every weight is there already
    assert merge(resume=True) == expected


def test_resuming_what_is_done_changes_nothing() -> None:
    expected = merge()
    assert merge(resume=True) == expected


def test_resuming_a_finished_plan_leaves_the_stopped_run_of_another_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, other = merge(), arithmetic()
    with monkeypatch.context() as patch:
        strike(patch, Writer, "write", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(other, overwrite=True)
    assert merge(resume=True) == expected
    assert Path("same/out.part", JOURNAL).exists()
    found = merge(other, resume=True, overwrite=True)
    shutil.rmtree("same")
    assert merge(other) == found


def test_a_stopped_run_over_an_old_output_replaces_it_only_with_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = undisturbed()
    old = merge(arithmetic())
    with monkeypatch.context() as patch:
        strike(patch, writer, "_sync_folder", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(overwrite=True)
    with pytest.raises(WriteError, match="is not empty"):
        merge(resume=True)
    assert hashes("same/out") == old
    assert merge(resume=True, overwrite=True) == expected


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_what_lies_in_the_way_and_is_not_ours_is_left_alone(options: dict[str, bool]) -> None:
    Path("same/out.part").mkdir(parents=True)
    Path("same/out.part/thesis.tex").write_text("years")
    with pytest.raises(WriteError, match="is not what a run of ours left"):
        merge(**options)
    assert Path("same/out.part/thesis.tex").read_text() == "years"


def test_an_output_that_is_a_link_is_refused_before_any_byte() -> None:
    Path("elsewhere").mkdir()
    for target in ("elsewhere", "nowhere"):
        Path("link").unlink(missing_ok=True)
        Path("link").symlink_to(target)
        with pytest.raises(WriteError, match="is a file or a link"):
            merge(out="link", overwrite=True)
        assert not Path("link.part").exists()


def test_another_plan_does_not_resume_a_stopped_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        strike(patch, Writer, "write", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge()
    before = hashes("same/out.part")
    with pytest.raises(WriteError, match="belongs to another plan"):
        merge(arithmetic(), resume=True)
    os.utime("maths/model-00001-of-00002.safetensors")
    with pytest.raises(WriteError, match="or its sources or options have changed since"):
        merge(resume=True)
    assert hashes("same/out.part") == before
    assert merge(resume=False, overwrite=True)


def during(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something at the n-th write of a merge, and nothing at any write within that."""
    calls, write = iter(range(1, 10**6)), Writer.write

    def acting(*given: Any) -> tuple[str, int]:
        if next(calls) == number:
            act()
        return write(*given)

    monkeypatch.setattr(Writer, "write", acting)


def test_an_old_output_stays_until_the_new_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    old, seen = merge(), list[dict[str, str]]()
    during(monkeypatch, WRITES - 3, lambda: seen.append(hashes("same/out")))
    new = merge(arithmetic(), overwrite=True)
    assert seen == [old] and new != old
    assert [path.name for path in Path("same").iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_run_beside_the_first_is_refused_and_spoils_nothing(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, said = undisturbed(), list[str]()

    def second() -> None:
        with pytest.raises(WriteError) as error:
            merge(**options)
        said.append(str(error.value))

    during(monkeypatch, 6, second)
    assert merge() == expected
    assert "another run is writing there" in said[0]


def full(*given: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_after_all_keeps_what_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("plan.yaml").write_text(PLAN)
    with monkeypatch.context() as patch:
        during(patch, 8, lambda: patch.setattr(os, "pwrite", full))
        result = cli("merge", "plan.yaml", "out", "--quiet")
    assert result.exit_code == 6
    assert "No space left on device; what was written is kept: --resume goes on" in result.stderr
    assert not Path("out").exists()
    assert cli("merge", "plan.yaml", "out", "--resume").exit_code == 0
    assert cli("merge", "plan.yaml", "again").exit_code == 0
    found, expected = hashes("out"), hashes("again")
    assert found.pop("README.md") and expected.pop("README.md")  # they differ in their title
    assert found.pop(RECEIPT) and expected.pop(RECEIPT)
    assert found == expected


def test_values_that_do_not_merge_leave_nothing() -> None:
    spoilt = load_file("maths/model-00002-of-00002.safetensors")
    spoilt["lm_head.weight"][-1, -1] = float("inf")
    save_file(spoilt, "maths/model-00002-of-00002.safetensors")
    with pytest.raises(OperatorError, match=r"lm_head\.weight holds inf"):
        merge(arithmetic())
    assert list(Path("same").iterdir()) == []


@pytest.mark.parametrize(
    "run",
    [{"threads": 4, "memory": 64 << 20}, {"threads": 4, "memory": 2 << 30}, {"memory": 2 << 30}],
)
def test_neither_budget_nor_threads_move_a_bit(run: dict[str, int]) -> None:
    assert undisturbed() == merge(**run)


def test_the_receipt_has_the_hash_of_every_file(models: Path) -> None:
    found = merge()
    del found[RECEIPT]
    receipt = json.loads(Path("same/out", RECEIPT).read_text())
    assert {name: file["sha256"] for name, file in receipt["outputs"].items()} == found
    for source in receipt["sources"]:
        there = hashes(models / source["reference"])
        for name, file in source["files"].items():
            assert file["sha256"] == there[name]
            assert file["size"] == (models / source["reference"] / name).stat().st_size


def test_a_source_that_was_written_anew_is_hashed_anew() -> None:
    merge()
    file = "model-00001-of-00002.safetensors"
    shutil.copy(f"chat/{file}", f"maths/{file}")
    merge(out="again")
    receipt = json.loads(Path("again", RECEIPT).read_text())
    recorded = {source["reference"]: source["files"] for source in receipt["sources"]}
    assert recorded["./maths"][file] == recorded["./chat"][file]
