"""DELLA keeps each rank of a row as often as it should, by chance alone, as the peer does.

The masks of the two toolkits come from different generators, so what is compared is statistics:
each against theory, and one against the other. Seeds are fixed, so no test fails by chance.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.peers.both import our_merge, their_merge
from tests.peers.conftest import Checkpoints
from tests.peers.draws import DRAWS, Draws
from tests.peers.families import Family
from tests.peers.peer import Peer, PeerError, Plan, tensors_of
from tests.peers.plans import plan_of

pytestmark = pytest.mark.peer

SIGMAS = 4.0
METHODS = ["della", "della_linear"]
CHANCES = [(0.5, 0.3), (0.8, 0.15), (0.3, 0.05)]  # density, epsilon


def float32(plan: Plan) -> Plan:
    return {**plan, "dtype": "float32"}


def one_model(method: str, family: Family, density: float, epsilon: float, **more: Any) -> Plan:
    own = {"weight": 1.0, "density": density, "epsilon": epsilon}
    return float32(plan_of(method, family, [own], **more))


def chance_of(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return how likely each entry is kept, from the paper's words: its rank within its row."""
    rows = delta.abs().reshape(-1, delta.shape[-1])
    rank = rows.argsort(dim=1).argsort(dim=1).double()
    p = density - epsilon + 2 * epsilon * rank / (delta.shape[-1] - 1)
    return p.view_as(delta)


def kept_and_chances(
    merged: dict[str, Tensor], family: Family, density: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return, of all tensors in one row, what was kept and how likely that was."""
    base, tuned = tensors_of(Path(family.base)), tensors_of(Path(family.tuned[0]))
    kept = [(merged[name] != base[name]).flatten() for name in sorted(base)]
    chances = [chance_of(tuned[n] - base[n], density, epsilon).flatten() for n in sorted(base)]
    return torch.cat(kept), torch.cat(chances)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("density", "epsilon"), CHANCES)
@pytest.mark.parametrize("method", METHODS)
def test_entries_are_kept_by_their_rank_as_the_peers(
    peer: Peer,
    checkpoints: Checkpoints,
    method: str,
    density: float,
    epsilon: float,
    rescale: bool,
) -> None:
    family = checkpoints("llama", vocab_size=2000)
    plan = one_model(method, family, density, epsilon, rescale=rescale)
    for merged in (our_merge(plan), their_merge(peer, family, plan, seed=1)):
        kept, chances = kept_and_chances(merged, family, density, epsilon)
        edges = torch.linspace(density - epsilon, density + epsilon, 9, dtype=torch.float64)
        for low, high in pairwise(edges.tolist()):
            some = (chances >= low) & (chances <= high)
            p = chances[some]
            spread = math.sqrt(float((p * (1 - p)).sum()))
            assert abs(float(kept[some].sum()) - float(p.sum())) < SIGMAS * spread


@pytest.mark.parametrize("epsilon", [0.25, 0.3])
def test_what_the_peer_refuses_when_it_comes_to_the_tensor_we_refuse_at_once(
    peer: Peer, checkpoints: Checkpoints, epsilon: float
) -> None:
    family = checkpoints("llama")
    plan = one_model("della", family, 0.75, epsilon)
    with pytest.raises(PeerError):
        their_merge(peer, family, plan)
    with pytest.raises(Exception, match=r"give epsilon less than 0\.25"):
        our_merge(plan)


def test_every_element_is_kept_as_often_as_it_should_be(
    peer: Peer, checkpoints: Checkpoints
) -> None:
    family, density, epsilon = checkpoints("llama"), 0.5, 0.3
    draws = Draws(peer, family, one_model("della_linear", family, density, epsilon, rescale=False))
    tuned = tensors_of(Path(family.tuned[0]))
    deltas = [tuned[name] - draws.base[name] for name in draws.names]
    p = torch.cat([chance_of(delta, density, epsilon).flatten() for delta in deltas])
    for kept in ((draws.ours != 0), (draws.theirs != 0)):
        counts = kept.double().sum(0)  # binomial in every element
        chi_square = float(((counts - DRAWS * p) ** 2 / (DRAWS * p * (1 - p))).sum())
        assert abs(chi_square - p.numel()) < SIGMAS * math.sqrt(2 * p.numel())


def test_divided_by_its_probability_each_entry_is_unbiased_and_by_norm_the_large_gain(
    peer: Peer, checkpoints: Checkpoints
) -> None:
    family, density, epsilon = checkpoints("llama"), 0.5, 0.3
    plan = one_model("della_linear", family, density, epsilon, rescale=True)
    exact, normed = (Draws(peer, family, plan, rescaling=how) for how in ("probability", "norm"))
    tuned = tensors_of(Path(family.tuned[0]))
    deltas = [(tuned[name] - exact.base[name]).double() for name in exact.names]
    p = torch.cat([chance_of(delta, density, epsilon).flatten() for delta in deltas])
    whole = exact.row(tuned)
    spread = whole.square() * (1 - p) / p / DRAWS
    chi_square = float(((exact.ours.mean(0) - whole).square() / spread).sum())
    assert abs(chi_square - whole.numel()) < SIGMAS * math.sqrt(3 * whole.numel())
    large = p > density + epsilon / 2
    gains = [float((d.mean(0) / whole)[large].mean()) for d in (normed.ours, normed.theirs)]
    assert all(gain > 1.1 for gain in gains)
    assert abs(gains[0] - gains[1]) < 0.05
    assert abs(float((exact.ours.mean(0) / whole)[large].mean()) - 1.0) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_merges_of_three_models_have_the_peers_mean_in_every_element(
    peer: Peer, checkpoints: Checkpoints, method: str
) -> None:
    family = checkpoints("qwen2")
    models: list[dict[str, Any]] = [{"weight": 0.6}, {"weight": 0.9}, {"weight": [0.3, 0.8]}]
    plan = float32(
        plan_of(method, family, models, density=0.6, epsilon=[0.2, 0.3], normalize=False)
    )
    draws = Draws(peer, family, plan)
    variance = draws.ours.var(0) + draws.theirs.var(0)
    squares = (draws.ours.mean(0) - draws.theirs.mean(0)) ** 2 / (variance / DRAWS)
    assert torch.isfinite(squares).all()
    freedom = 2 * DRAWS - 2
    expected = freedom / (freedom - 2)  # the mean of Student's t squared
    assert abs(float(squares.mean()) - expected) < 0.1
    assert float(squares.max()) < 40.0
