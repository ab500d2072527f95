"""What rounding to the stored dtype leaves of a merge's change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft import engine, writer
from mergekit_ft.errors import OperatorError
from mergekit_ft.rounding import STRIDE, WINDOW, windows
from mergekit_ft.sources.sides import RECEIPT
from tests.checkpoints import write_checkpoint
from tests.small_models import arithmetic, hashes, three

STEP = 2.0**-7  # of bfloat16 from 1 to 2
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def model(name: str, values: Tensor, **more: Tensor) -> None:
    write_checkpoint(Path(name), {NAME: values.bfloat16(), **more})


def told(plan: str, **options: Any) -> list[str]:
    """Merge, and return what the receipt says of rounding."""
    made = engine.merge(plan, "out", overwrite=True, **options)
    notes = [note for note in made.notes if "the change is" in note]
    receipt = json.loads(Path("out", RECEIPT).read_text())["notes"]
    assert [note for note in receipt if "the change is" in note] == notes
    return notes


def steps(*counts: int) -> Tensor:
    """Return 1.5 moved by steps of bfloat16."""
    return 1.5 + STEP * torch.tensor(counts, dtype=torch.float32)


@pytest.mark.parametrize(
    ("weight", "counts", "along", "cosine"),
    [
        # asked, in steps: .3 .3 .3 .9; stored: 0 0 0 1
        (0.3, (1, 1, 1, 3), 0.9 / 1.08, 0.9 / math.sqrt(1.08)),
        # .7 .7 -.7 1.4; 1 1 -1 1
        (0.7, (1, 1, -1, 2), 3.5 / 3.43, 3.5 / math.sqrt(3.43 * 4)),
        # .6 .6 0 -.6; 1 1 0 -1
        (0.6, (1, 1, 0, -1), 1.8 / 1.08, 1.0),
    ],
)
def test_what_is_left_is_told(
    weight: float, counts: tuple[int, ...], along: float, cosine: float
) -> None:
    model("base", steps(0, 0, 0, 0).view(2, 2))
    model("maths", steps(*counts).view(2, 2))
    notes = told(arithmetic(weight=str(weight)))
    if abs(along - 1) <= 0.1 and cosine >= 0.9:
        assert notes == []
    else:
        assert f"the change is {along:.2f} times what" in notes[0]
        assert f"cosine of {cosine:.2f}" in notes[0] and "bfloat16" in notes[0]
    assert told(arithmetic(weight=str(weight), more="out_dtype: float32\n")) == []


def test_whole_task_vectors_and_merges_without_a_base_say_nothing() -> None:
    model("base", steps(0, 0, 0, 0))
    model("maths", steps(1, 2, -1, 3))
    model("chat", steps(2, 2, 0, 3))
    assert told(arithmetic(weight="1.0")) == []
    mean = three("linear", "weight: 1.0").replace("base_model: ./base\n", "")
    assert told(mean) == []


def test_each_tensor_stands_for_all_its_elements() -> None:
    numel = 4 * WINDOW
    base = {"model.norm.weight": steps(0).bfloat16()}
    maths = {"model.norm.weight": steps(2).bfloat16()}
    model("base", steps(0).expand(numel), **base)
    model("maths", steps(1).expand(numel), **maths)
    # asked .6 of each and 1.2 of one, stored 1 and 1: all elements count, not only those seen
    asked, along = numel * 0.36 + 1.44, numel * 0.6 + 1.2
    (note,) = told(arithmetic(weight="0.6"))
    assert f"the change is {along / asked:.2f} times" in note


def test_a_change_that_rounding_takes_away_is_refused_by_that_name() -> None:
    model("base", steps(0, 0, 0, 0))
    model("maths", steps(1, -1, 1, 1))
    with pytest.raises(OperatorError, match=r"less than half a step.*out_dtype: float32"):
        told(arithmetic(weight="0.4"))
    assert not Path("out").exists()
    with pytest.raises(OperatorError, match="check the weights"):
        told(arithmetic(weight="0.0"))


def test_a_sample_is_the_same_however_a_tensor_is_cut() -> None:
    wanted = [i for i in range(3 * STRIDE + 100) if i % STRIDE < WINDOW]
    for cuts in ([1], [STRIDE], [65536], [WINDOW - 1, 2 * STRIDE + 5], [STRIDE - 1, 3]):
        seen, at, turn = [], 0, 0
        while at < 3 * STRIDE + 100:
            n = min(max(cuts[turn % len(cuts)], 999), 3 * STRIDE + 100 - at)
            for part in windows(at, n):
                seen += range(at + part.start, at + part.stop)
            at, turn = at + n, turn + 1
        assert seen == wanted


def test_the_receipt_does_not_depend_on_budget_threads_or_a_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dice = torch.Generator().manual_seed(0)
    for name in ("base", "maths"):
        some = {
            f"model.layers.{i}.mlp.up_proj.weight": torch.randn(300_000, generator=dice).bfloat16()
            for i in range(1, 4)
        }
        model(name, torch.randn(STRIDE + 70_000, generator=dice), **some)
    plan = arithmetic(weight="0.001")
    assert "times what the plan asks" in told(plan)[0]
    expected = hashes("out")
    for options in ({"memory": 6 << 20, "threads": 1}, {"threads": 2}):
        assert told(plan, **options) and hashes("out") == expected
    monkeypatch.setattr(writer, "BATCH", 1)
    write = writer.Writer.write

    def struck(*given: Any) -> Any:
        if given[1] == "model.layers.3.mlp.up_proj.weight":
            raise KeyboardInterrupt
        return write(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.Writer, "write", struck)
        engine.merge(plan, "again", threads=1)
    assert '"rounded"' in Path("again.part", writer.JOURNAL).read_text()
    engine.merge(plan, "again", threads=1, resume=True)
    assert hashes("again") == expected
