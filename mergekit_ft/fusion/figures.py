"""How weights fare: the likelihood of what came, and how far the models are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mergekit_ft.algebra.divergence import forward_kl
from mergekit_ft.algebra.fused import exact_sum, fuse, shifts
from mergekit_ft.fusion.collecting import Recorded

Figures = dict[str, float]


def figures(hearing: Recorded, alphas: Mapping[str, Sequence[float]]) -> Figures:
    """Return nats a token of the base, of each expert alone, and of each set of weights.

    `kl NAME` is KL(fused || base) with those weights.
    """
    rows = []
    names = ["base", *(f"expert {name}" for name in hearing.names), *alphas]
    names += [f"kl {name}" for name in alphas]
    for heard in hearing:
        moves = shifts(heard.tuned, heard.small)
        base = torch.log_softmax(heard.base.double(), -1)
        fused = [fuse(base, moves, torch.tensor(a, dtype=torch.float64)) for a in alphas.values()]
        alone = [torch.log_softmax(expert.double(), -1) for expert in heard.tuned]
        at = heard.targets[:, None]
        nats = [-logs.gather(1, at)[:, 0] for logs in (base, *alone, *fused)]
        apart = [forward_kl(logs, base) for logs in fused]
        weights = heard.weights.double()[:, None]
        table = torch.stack([*nats, *apart], dim=1)
        rows.append(weights * torch.cat([torch.ones_like(weights), table], dim=1))
    sums = exact_sum(rows)
    return dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True))
