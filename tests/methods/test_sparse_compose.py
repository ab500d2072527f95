"""Sparse composition: theta_0 + sum_i w_i phi_i, in any order the same bytes."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file

import mergekit_ft
from mergekit_ft.contract import NOWHERE
from mergekit_ft.deltas.compose import compose
from mergekit_ft.deltas.extract import extract
from mergekit_ft.methods.sparse_compose import SparseCompose
from tests.checkpoints import write_checkpoint
from tests.merging import Case
from tests.small_models import cli, models, weights

__all__ = ["models"]

BASE = [10.0, 20.0, 30.0, 40.0]
MATHS = [11.0, 20.0, 28.0, 40.0]  # (1, 0, -2, 0)
CHAT = [10.0, 24.0, 33.0, 40.0]  # (0, 4, 3, 0)


def merge(*weight: float) -> list[float]:
    return Case(SparseCompose(weight=weight), BASE, MATHS, CHAT).values().tolist()


def test_deltas_are_added_with_their_weights() -> None:
    assert merge(1.0, 1.0) == [11.0, 24.0, 31.0, 40.0]
    assert merge(2.0, 0.5) == [12.0, 22.0, 27.5, 40.0]


def test_what_no_delta_touches_keeps_its_bits() -> None:
    case = Case(SparseCompose(weight=(1.0, -1.0)), [-0.0, 1.0], [-0.0, 2.0], [-0.0, 1.0])
    assert torch.equal(case.values().view(torch.int32)[0], torch.tensor(-(2**31)))


def test_the_order_of_the_models_moves_no_bit() -> None:
    dice = torch.Generator().manual_seed(0)
    base, *rows = torch.randn(4, 10_000, generator=dice)
    made = set()
    for order in itertools.permutations(range(3)):
        operator = SparseCompose(weight=tuple(0.1 * (i + 1) for i in order))
        ids = [("maths", "chat", "code")[i] for i in order]
        values = Case(operator, base, *(rows[i] for i in order), ids=ids).values()
        made.add(hashlib.sha256(values.numpy().tobytes()).hexdigest())
    assert len(made) == 1


def test_a_model_that_alone_is_heard_is_copied_where_its_weight_is_1() -> None:
    assert SparseCompose(weight=(0.0, 1.0)).copies(2, "w", NOWHERE) == 1
    assert SparseCompose(weight=(0.0, 0.0)).copies(2, "w", NOWHERE) == -1
    assert SparseCompose(weight=(0.5, 1.0)).copies(2, "w", NOWHERE) is None


def test_density_is_refused_with_where_it_belongs() -> None:
    plan = "merge_method: sparse_compose\nbase_model: ./base\nmodels:\n  - model: ./maths\n"
    done = cli("merge", "-", "out", text=f"{plan}    parameters: {{weight: 1, density: 0.1}}\n")
    assert done.exit_code == 3 and "delta extract" in done.stderr


def test_deltas_of_a_plan_in_all_orders_are_one_model(models: Path) -> None:
    write_checkpoint(models / "code", weights(7))
    names = ("maths", "chat", "code")
    for name in names:
        extract("base", name, f"{name}.safetensors", density=0.1)
    made = set()
    for number, order in enumerate(itertools.permutations(names)):
        entries = "".join(
            f"  - model: ./base\n    delta: ./{name}.safetensors\n"
            f"    parameters: {{weight: {0.3 + 0.1 * names.index(name):.1f}}}\n"
            for name in order
        )
        head = "merge_method: sparse_compose\nbase_model: ./base\nmodels:\n"
        done = mergekit_ft.merge(head + entries, f"out{number}")
        data = (done.out / "model.safetensors").read_bytes()
        made.add(hashlib.sha256(data).hexdigest())
    assert len(made) == 1
    terms = [(f"{name}.safetensors", 0.3 + 0.1 * i) for i, name in enumerate(names)]
    compose(terms, "sum.safetensors", base="base")
    plan = "merge_method: passthrough\nmodels:\n  - model: ./base\n    delta: ./sum.safetensors\n"
    mergekit_ft.merge(plan, "composed")
    one = load_file(models / "out0" / "model.safetensors")
    for name, other in load_file(models / "composed" / "model.safetensors").items():
        assert torch.allclose(one[name], other, rtol=1e-6, atol=1e-7)
