"""DARE keeps the share it should, by chance alone, and its mean is the whole delta.

The masks of the two toolkits come from different generators, so what is compared is statistics:
each against theory, and one against the other. Seeds are fixed, so no test fails by chance.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.peers.both import our_merge, their_merge
from tests.peers.conftest import Checkpoints
from tests.peers.draws import DRAWS, Draws
from tests.peers.families import Family
from tests.peers.peer import Peer, Plan, tensors_of
from tests.peers.plans import plan_of

pytestmark = pytest.mark.peer

LARGE = {"vocab_size": 5003, "hidden_size": 64, "layers": 1}  # embeddings of 320,192 elements
SIGMAS = 4.0
METHODS = ["dare_linear", "dare_ties"]
DENSITIES = [0.1, 0.5, 0.83]


def float32(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32"}


def delta_of(merged: dict[str, Tensor], family: Family) -> Tensor:
    """Return what a merge added to the base, in float64, all tensors in one row."""
    return flat(merged) - flat(tensors_of(Path(family.base)))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def deviation(counted: int, tries: int, probability: float) -> float:
    """Return by how many standard deviations a count of successes is off."""
    spread = math.sqrt(tries * probability * (1 - probability))
    return abs(counted - tries * probability) / spread


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_kept_share_is_the_density_and_the_peers(
    peer: Peer, checkpoints: Checkpoints, method: str, density: float, rescale: bool
) -> None:
    family = checkpoints("llama", vocab_size=2000)
    own = {"weight": 1.0, "density": density}
    plan = float32(plan_of(method, family, [own], rescale=rescale))
    ours = delta_of(our_merge(plan), family) != 0
    theirs = delta_of(their_merge(peer, family, plan, seed=1), family) != 0
    numel = ours.numel()
    assert deviation(int(ours.sum()), numel, density) < SIGMAS
    assert deviation(int(theirs.sum()), numel, density) < SIGMAS
    apart = abs(int(ours.sum()) - int(theirs.sum()))
    assert apart < SIGMAS * math.sqrt(2 * numel * density * (1 - density))


@pytest.mark.parametrize("density", DENSITIES)
def test_each_tensor_keeps_its_share_on_its_own(checkpoints: Checkpoints, density: float) -> None:
    family = checkpoints("gpt2", layers=12)
    plan = float32(plan_of("dare_linear", family, [{"weight": 1.0, "density": density}]))
    base = tensors_of(Path(family.base))
    squares = [
        deviation(int((tensor != base[name]).sum()), tensor.numel(), density) ** 2
        for name, tensor in our_merge(plan).items()
    ]
    count = len(squares)
    assert abs(sum(squares) - count) < SIGMAS * math.sqrt(2 * count)  # chi-square


@pytest.mark.parametrize("lag", [1, 64, 4096, 65_536, 131_072, 262_144])
def test_a_mask_does_not_repeat_within_a_large_tensor(checkpoints: Checkpoints, lag: int) -> None:
    family, density = checkpoints("llama", **LARGE), 0.4
    plan = float32(plan_of("dare_linear", family, [{"weight": 1.0, "density": density}]))
    kept = our_merge(plan)["lm_head.weight"] != tensors_of(Path(family.base))["lm_head.weight"]
    mask = kept.flatten()
    both = int((mask[lag:] & mask[:-lag]).sum())
    assert deviation(both, mask.numel() - lag, density**2) < SIGMAS


def test_tensors_of_one_shape_have_masks_of_their_own(checkpoints: Checkpoints) -> None:
    family, density = checkpoints("llama", **LARGE), 0.4
    plan = float32(plan_of("dare_linear", family, [{"weight": 1.0, "density": density}]))
    merged, base = our_merge(plan), tensors_of(Path(family.base))
    head, embedding = (
        merged[n] != base[n] for n in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert deviation(int((head & embedding).sum()), head.numel(), density**2) < SIGMAS


def test_the_masks_of_two_models_are_independent_as_the_peers(
    peer: Peer, checkpoints: Checkpoints
) -> None:
    family = checkpoints("llama", vocab_size=2000)
    models = [{"weight": 1.0, "density": 0.3}, {"weight": 1.0, "density": 0.8}]
    plan = float32(plan_of("dare_linear", family, models, rescale=False))
    first, second = (
        flat(tensors_of(Path(path))) - flat(tensors_of(Path(family.base)))
        for path in family.tuned[:2]
    )
    outcomes = torch.stack([0 * first, first, second, first + second])
    expected = torch.tensor([0.7 * 0.2, 0.3 * 0.2, 0.7 * 0.8, 0.3 * 0.8]) * first.numel()
    for merged in (our_merge(plan), their_merge(peer, family, plan, seed=2)):
        seen = (outcomes - delta_of(merged, family)).abs().argmin(0).bincount(minlength=4)
        assert float(((seen - expected) ** 2 / expected).sum()) < 21.1  # chi-square(3): p = 1e-4


def test_every_element_is_kept_as_often_as_it_should_be(
    peer: Peer, checkpoints: Checkpoints
) -> None:
    family, density = checkpoints("llama"), 0.4
    own = {"weight": 1.0, "density": density}
    draws = Draws(peer, family, float32(plan_of("dare_linear", family, [own], rescale=True)))
    for deltas in (draws.ours, draws.theirs):
        kept = (deltas != 0).double().sum(0)  # binomial in every element
        spread = DRAWS * density * (1 - density)
        chi_square = float(((kept - DRAWS * density) ** 2 / spread).sum())
        assert abs(chi_square - kept.numel()) < SIGMAS * math.sqrt(2 * kept.numel())


@pytest.mark.parametrize("rescaling", ["norm", "density"])
def test_the_mean_over_many_draws_is_the_weighted_sum_of_whole_deltas(
    peer: Peer, checkpoints: Checkpoints, rescaling: str
) -> None:
    family, density, weights = checkpoints("llama"), 0.4, (0.6, 0.9)
    models: list[dict[str, Any]] = [{"weight": weight} for weight in weights]
    plan = float32(plan_of("dare_linear", family, models, density=density, rescale=True))
    draws = Draws(peer, family, plan, rescaling=rescaling)
    terms = [w * draws.delta(path) for w, path in zip(weights, family.tuned, strict=False)]
    whole = torch.stack(terms).sum(0)
    spread = torch.stack(terms).square().sum(0) * (1 - density) / density / DRAWS
    for deltas in (draws.ours, draws.theirs):
        off = deltas.mean(0) - whole
        assert float(off.abs().mean() / whole.abs().mean()) < 0.2
        signed = float((off * whole.sign()).sum() / spread.sum().sqrt())
        assert abs(signed) < SIGMAS  # no more and no less than the whole
        chi_square = float((off**2 / spread).sum())
        assert abs(chi_square / off.numel() - 1) < 0.1  # off by no more than chance, everywhere


@pytest.mark.parametrize("method", METHODS)
def test_merges_of_three_models_have_the_peers_mean_in_every_element(
    peer: Peer, checkpoints: Checkpoints, method: str
) -> None:
    family = checkpoints("qwen2")
    models: list[dict[str, Any]] = [{"weight": 0.6}, {"weight": 0.9}, {"weight": [0.3, 0.8]}]
    plan = float32(plan_of(method, family, models, density=0.5, normalize=False))
    draws = Draws(peer, family, plan)
    variance = draws.ours.var(0) + draws.theirs.var(0)
    squares = (draws.ours.mean(0) - draws.theirs.mean(0)) ** 2 / (variance / DRAWS)
    assert torch.isfinite(squares).all()
    freedom = 2 * DRAWS - 2
    expected = freedom / (freedom - 2)  # the mean of Student's t squared
    assert abs(float(squares.mean()) - expected) < 0.1
    assert float(squares.max()) < 40.0
