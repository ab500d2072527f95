"""A pack: one vector, a bit an entry and a number for each task, and every task's model again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.deltas.packing import pack, unpack
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.delta_file import open_delta
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, models, weights

__all__ = ["models"]

NORM = "model.norm.weight"
TASKS = {"maths": "maths", "chat": "chat"}


def by_hand(**rows: list[float]) -> None:
    """Write models that differ from ./base in the final norm alone."""
    base = weights(0) | {NORM: torch.zeros(8)}
    write_checkpoint(Path("base"), base, config=CONFIG)
    for name, row in rows.items():
        write_checkpoint(Path(name), base | {NORM: torch.tensor(row)}, config=CONFIG)


def parts(path: str = "p.safetensors") -> tuple[list[float], list[list[int]]]:
    delta = open_delta(Path(path))
    held = load_file(path)
    bits = np.unpackbits(held[f"{NORM}:masks"].numpy(), axis=1, bitorder="little")
    assert list(delta.changes) == [NORM]
    return held[f"{NORM}:unified"].tolist(), bits.tolist()


def test_emr_elects_a_sign_takes_the_largest_and_rescales() -> None:
    by_hand(
        maths=[1.0, -4.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0],
        chat=[3.0, 1.0, -2.0, 0.0, 3.0, -1.0, 0.0, 0.0],
    )
    made = pack("base", TASKS, "p.safetensors")
    # means 2, -1.5, 0, 0, 3, -0.5: signs + - - - + -
    unified, masks = parts()
    assert unified == [3.0, -4.0, -2.0, 0.0, 3.0, -1.0, 0.0, 0.0]
    assert masks == [[1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 0, 0]]
    # |d_t| 10 and 10; kept |d| 3 + 4 + 3 and 3 + 2 + 3 + 1
    assert made.scales == {"maths": 10 / 10, "chat": 10 / 9}


def test_tall_masks_keep_what_a_task_needs_of_the_sum() -> None:
    by_hand(
        maths=[4.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        chat=[0.1, 4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    )
    made = pack("base", TASKS, "p.safetensors", method="tall", threshold=0.5)
    unified, masks = parts()
    assert unified[:3] == pytest.approx([4.1, 4.1, 2.0])
    assert masks == [[1, 0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert made.scales == {"maths": 1.0, "chat": 1.0}


def emr(base: Tensor, tuned: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    deltas = torch.stack([(t.double() - base.double()) for t in tuned])
    sign = torch.where(deltas.mean(0) > 0, 1.0, -1.0).double()
    masks = [delta * sign > 0 for delta in deltas]
    largest = torch.stack([d.abs() * m for d, m in zip(deltas, masks, strict=True)]).amax(0)
    return sign * largest, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_comes_out_as_the_formula_says_rounded_once(dtype: torch.dtype) -> None:
    held = {name: weights(seed, dtype=dtype) for seed, name in enumerate(("base", *TASKS))}
    for name, tensors in held.items():
        write_checkpoint(Path(name), tensors, config=CONFIG)
    pack("base", TASKS, "p.safetensors")
    own, kept = [0.0, 0.0], [0.0, 0.0]
    plain: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for name, base in held["base"].items():
        unified, masks = emr(base, [held[task][name] for task in TASKS])
        unified = unified.to(dtype).double()
        plain[name] = unified, masks
        for i, task in enumerate(TASKS):
            own[i] += float((held[task][name].double() - base.double()).abs().sum())
            kept[i] += float((unified.abs() * masks[i]).sum())
    for i, task in enumerate(TASKS):
        unpack("p.safetensors", task, f"out-{task}", base="base")
        made = load_file(f"out-{task}/model.safetensors")
        for name, base in held["base"].items():
            unified, masks = plain[name]
            wanted = base.double() + own[i] / kept[i] * masks[i] * unified
            assert torch.allclose(
                made[name].double(),
                wanted.to(dtype).double(),
                rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
                atol=1e-6,
            )


def test_one_task_alone_is_its_own_model_up_to_rounding() -> None:
    pack("base", {"maths": "maths"}, "p.safetensors")
    unpack("p.safetensors", "maths", "out", base="base")
    made, wanted = load_file("out/model.safetensors"), load_file("maths/model.safetensors")
    assert all(torch.allclose(made[name], wanted[name], atol=1e-6) for name in wanted)


def test_memory_moves_no_bit() -> None:
    found = set()
    for memory in (1 << 20, 1 << 30):
        pack("base", TASKS, "p.safetensors", memory=memory, overwrite=True)
        found.add(Path("p.safetensors").read_bytes())
    assert len(found) == 1


def test_a_task_stands_in_a_plan() -> None:
    pack("base", TASKS, "p.safetensors")
    text = (
        "merge_method: linear\nparameters: {weight: 0.5}\nmodels:\n"
        "  - {model: base, delta: {path: p.safetensors, task: maths}}\n"
        "  - {model: base, delta: {path: p.safetensors, task: chat}}\n"
    )
    assert cli("merge", "-", "out", text=text).exit_code == 0
    assert cli("verify", "out").exit_code == 0


@pytest.mark.parametrize(
    ("task", "told"),
    [("math", "has no task 'math'; did you mean 'maths'? (tasks: maths, chat)")],
)
def test_an_unknown_task_is_told_with_the_nearest(task: str, told: str) -> None:
    pack("base", TASKS, "p.safetensors")
    result = cli("delta", "unpack", "p.safetensors", task, "out", "--base", "base")
    assert result.exit_code in (3, 4) and told in result.stderr
    result = cli("delta", "apply", "base", "p.safetensors", "out")
    assert result.exit_code in (3, 4) and "is a pack of 2 tasks: name one" in result.stderr


def test_another_base_and_models_of_another_shape_are_refused() -> None:
    pack("base", TASKS, "p.safetensors")
    with pytest.raises(SourceError, match="has SHA-256"):
        unpack("p.safetensors", "maths", "out", base="chat")
    held = load_file("chat/model.safetensors")
    del held[NORM]
    held["more"] = torch.ones(2)
    save_file(held, "chat/model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"(?s)model\.norm\.weight is not what.*more"):
        pack("base", TASKS, "q.safetensors")
    assert not Path("q.safetensors").exists()


def test_the_command_line_packs_tells_and_unpacks() -> None:
    words = ("maths=maths", "chat=chat", "p.safetensors")
    result = cli("delta", "pack", "base", *words, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert set(report["scales"]) == set(TASKS)
    assert report["dense"] == 2 * sum(
        t.nbytes for t in load_file("base/model.safetensors").values()
    )
    told = cli("delta", "info", "p.safetensors").stdout
    assert "task maths: scale" in told
    assert cli("delta", "unpack", "p.safetensors", "chat", "out", "--base", "base").exit_code == 0
    assert cli("delta", "pack", "base", "maths", "q.safetensors").exit_code == 2
