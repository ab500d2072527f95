"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_ft.contract import NOWHERE
from mergekit_ft.methods.passthrough import Passthrough
from tests.merging import Case
from tests.small_models import merged, refused, same_bytes, tensors
from tests.small_models import models as models


def test_a_scale_multiplies_every_value() -> None:
    case = Case(Passthrough(scale=(-0.5,)), [], [1.0, -4.0, 0.0])
    assert case.values().tolist() == [-0.5, 2.0, 0.0]
    assert torch.equal(case.values().double(), case.reference())


def test_without_a_scale_the_model_is_copied() -> None:
    found = [Passthrough(scale=(s,)).copies(1, "w", NOWHERE) for s in (None, 1.0, 0.0)]
    assert found == [0, 0, None]


def test_one_model_comes_out_byte_for_byte() -> None:
    merged("merge_method: passthrough\nmodels: [{model: ./maths}]\n")
    assert same_bytes(tensors("out"), tensors("maths")) == set(tensors("maths"))


def test_a_filter_scales_only_what_it_selects(models: Path) -> None:
    merged(
        "merge_method: passthrough\nmodels:\n  - model: ./maths\n    parameters:\n"
        "      scale:\n        - {filter: up_proj, value: 0.0}\n"
    )
    before, after = tensors(models / "maths"), tensors("out")
    assert {name for name in before if "up_proj" in name} == set(before) - same_bytes(before, after)
    assert all(not after[name].any() for name in before if "up_proj" in name)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: passthrough\nmodels: [{model: ./maths}, {model: ./chat}]\n",
        "merge_method: passthrough\nbase_model: ./base\nmodels: [{model: ./maths}]\n",
    ],
)
def test_two_models_are_refused(text: str) -> None:
    refused(3, "passthrough takes 1 model", text)


def test_a_base_that_is_listed_is_the_model() -> None:
    merged(
        "merge_method: passthrough\nbase_model: ./maths\nmodels: [{model: ./maths}]\n",
        "out",
        "--allow-unchanged",
    )
    assert same_bytes(tensors("out"), tensors("maths")) == set(tensors("maths"))
