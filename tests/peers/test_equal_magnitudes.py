"""Where magnitudes at the threshold are equal, as many are kept as there, and the same magnitudes.

mergekit sorts without keeping the order of equals, so which of them it keeps is chance; ours keeps
those of the lowest index.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import tiny_llama, write_checkpoint
from tests.peers.both import our_merge
from tests.peers.peer import Peer, Plan, tensors_of

pytestmark = pytest.mark.peer

DENSITIES = [0.03, 0.25, 0.5, 0.9]


def coarse_model(folder: Path) -> tuple[Path, Path]:
    """Write a base of zeros and a model whose values are multiples of 1/8 up to 1, no zeros."""
    example = tiny_llama(folder / "example", vocab_size=5003, hidden_size=64)  # 320,192 elements
    config = (example / "config.json").read_text()
    draw = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in tensors_of(example).items()}
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    steps = {name: torch.randint(1, 9, shape, generator=draw) / 8 for name, shape in shapes.items()}
    signs = {name: torch.randint(0, 2, shape, generator=draw) for name, shape in shapes.items()}
    coarse = {name: torch.where(signs[name] == 1, step, -step) for name, step in steps.items()}
    base = write_checkpoint(folder / "base", zeros)
    tuned = write_checkpoint(folder / "tuned", coarse)
    for written in (base, tuned):
        (written / "config.json").write_text(config)
    return base, tuned


def first_of_the_largest(values: Tensor, density: float) -> Tensor:
    """Return what the rule says, worked by a stable sort."""
    count = max(1, math.trunc(density * values.numel()))
    order = values.flatten().abs().sort(descending=True, stable=True).indices[:count]
    kept = torch.zeros_like(values).flatten()
    kept[order] = values.flatten()[order]
    return kept.view_as(values)


@pytest.mark.parametrize("density", DENSITIES)
def test_ties_keeps_the_magnitudes_that_the_peer_keeps(
    peer: Peer, tmp_path: Path, density: float
) -> None:
    base, tuned = coarse_model(tmp_path)
    plan: Plan = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": 1.0, "density": density}}],
        "dtype": "float32",
    }
    ours, theirs, values = our_merge(plan), peer.merge(plan), tensors_of(tuned)
    for name, kept in ours.items():
        assert torch.equal(kept.abs().flatten().sort()[0], theirs[name].abs().flatten().sort()[0])
        assert torch.equal(kept, first_of_the_largest(values[name], density)), name
    assert any(not torch.equal(kept, theirs[name]) for name, kept in ours.items())


@pytest.mark.parametrize(("density", "gamma"), [(0.25, 0.03), (0.5, 0.5), (0.9, 0.01), (0.03, 0.2)])
def test_breadcrumbs_keeps_the_magnitudes_that_the_peer_keeps(
    peer: Peer, tmp_path: Path, density: float, gamma: float
) -> None:
    base, tuned = coarse_model(tmp_path)
    own = {"weight": 1.0, "density": density, "gamma": gamma}
    plan: Plan = {
        "merge_method": "breadcrumbs",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": own}],
        "dtype": "float32",
    }
    ours, theirs, values = our_merge(plan), peer.merge(plan), tensors_of(tuned)
    for name, kept in ours.items():
        assert torch.equal(kept.abs().flatten().sort()[0], theirs[name].abs().flatten().sort()[0])
        most = math.trunc(density * values[name].numel())
        large = min(math.trunc(gamma * values[name].numel()), values[name].numel() - most)
        order = values[name].flatten().abs().sort(descending=True, stable=True).indices
        expected = torch.zeros_like(values[name]).flatten()
        band = order[large : large + most]
        expected[band] = values[name].flatten()[band]
        assert torch.equal(kept.flatten(), expected), name
    assert any(not torch.equal(kept, theirs[name]) for name, kept in ours.items())
