"""Logit fusion baked: theta_0 + sum_t a_t (theta_t - theta_0)."""

from __future__ import annotations

import torch

from mergekit_ft.contract import NOWHERE
from mergekit_ft.methods.logit_fusion import LogitFusion
from mergekit_ft.methods.task_arithmetic import TaskArithmetic
from tests.merging import Case

BASE = [10.0, 20.0]
MATHS, CHAT = [11.0, 18.0], [13.0, 24.0]  # task vectors (1, -2) and (3, 4)


def values(kind: type, *weight: float) -> torch.Tensor:
    return Case(kind.model_validate({"weight": weight}), BASE, MATHS, CHAT).values()


def test_task_vectors_are_added_by_their_weights() -> None:
    # 0.75 (1, -2) + 0.5 (3, 4) = (2.25, 0.5)
    assert values(LogitFusion, 0.75, 0.5).tolist() == [12.25, 20.5]


def test_it_is_task_arithmetic_with_the_same_weights() -> None:
    assert torch.equal(values(LogitFusion, 0.72, 0.83), values(TaskArithmetic, 0.72, 0.83))


def test_a_model_that_alone_is_heard_is_copied_where_its_factor_is_1() -> None:
    assert LogitFusion(weight=(0.0, 1.0)).copies(2, "w", NOWHERE) == 1
    assert LogitFusion(weight=(0.0, 0.0)).copies(2, "w", NOWHERE) == -1
    assert LogitFusion(weight=(0.5, 0.0)).copies(2, "w", NOWHERE) is None
