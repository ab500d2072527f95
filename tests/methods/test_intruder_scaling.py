"""Scaling changes the component that is named, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_ft.contract import NOWHERE
from mergekit_ft.layers import places
from mergekit_ft.methods.intruder_scaling import IntruderScaling
from tests.merging import Case

NAME = "model.layers.0.mlp.up_proj.weight"
PLACE = places([NAME])[NAME]


def matrices() -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(3)
    base = torch.randn(24, 40, generator=dice, dtype=torch.float64)
    change = torch.zeros_like(base)
    for size in (40.0, 25.0):
        u = torch.randn(24, generator=dice, dtype=torch.float64)
        v = torch.randn(40, generator=dice, dtype=torch.float64)
        change += size * torch.outer(u / u.norm(), v / v.norm())
    return base, base + change


def made(transposed: bool = False, **parameters: object) -> Tensor:
    """Return what is added to the model's delta."""
    base, tuned = matrices()
    if transposed:
        base, tuned = base.T.contiguous(), tuned.T.contiguous()
    operator = IntruderScaling.model_validate({"transposed": transposed, **parameters})
    case = Case(
        operator, base, tuned, shape=tuple(base.shape), name=NAME, place=PLACE, dtype=torch.float64
    )
    extra = case.merged().view(base.shape) - (tuned - base)
    return extra.T if transposed else extra


@pytest.mark.parametrize("transposed", [False, True])
def test_the_top_intruder_alone_is_scaled(transposed: bool) -> None:
    _, tuned = matrices()
    u, s, vh = torch.linalg.svd(tuned, full_matrices=False)
    extra = made(transposed, **{"lambda": 0.25, "epsilon": 0.9})
    wanted = -0.75 * s[0] * torch.outer(u[:, 0], vh[0])
    assert torch.allclose(extra, wanted, atol=1e-10)
    residual = extra - (u[:, :1] @ (u[:, :1].T @ extra))  # outside the direction that was named
    assert float(residual.abs().max()) < 1e-10


def test_all_intruders_are_scaled_where_asked() -> None:
    base, tuned = matrices()
    u, s, vh = torch.linalg.svd(tuned, full_matrices=False)
    u0 = torch.linalg.svd(base, full_matrices=False).U
    hits = [j for j in range(10) if float((u0.T @ u[:, j]).abs().max()) < 0.6]
    assert len(hits) > 1
    extra = made(which="all", epsilon=0.6, **{"lambda": 0.0})
    wanted = sum(-s[j] * torch.outer(u[:, j], vh[j]) for j in hits)
    assert torch.allclose(extra, wanted, atol=1e-10)


def test_where_nothing_intrudes_nothing_changes() -> None:
    assert not bool(made(epsilon=1e-9).any())


def test_lambda_1_and_what_is_beside_the_layers_are_copies() -> None:
    assert IntruderScaling.model_validate({"lambda": 1.0}).copies(1, NAME, PLACE) == 0
    assert IntruderScaling().copies(1, "model.embed_tokens.weight", NOWHERE) == 0
    norm = "model.layers.0.input_layernorm.weight"
    assert IntruderScaling().copies(1, norm, places([norm])[norm]) == 0
    assert IntruderScaling().copies(1, NAME, PLACE) is None
