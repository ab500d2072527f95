"""Whether a model says what fused models say: divergence, likelihood, agreement, by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.divergence import forward_kl
from mergekit_ft.algebra.fused import exact_sum, fuse, shifts
from mergekit_ft.fusion.collecting import Collection, Recorded
from mergekit_ft.fusion.recording import batches, said
from mergekit_ft.fusion.texts import Part, scored
from mergekit_ft.models.speaker import Speaker

NEAR, SHARE = 0.05, 0.1  # nats, and share of KL(fused || base), that a merge may be away
WORSE = 0.01  # nats, or the same share of what the fused models need, that it may lose on labels
COLUMNS = ("nats base", "nats fused", "nats merged", "kl merged", "kl base", "agreement")
Measured = dict[str, dict[str, float]]  # by domain


def measured(
    speaker: Speaker,
    collection: Collection,
    names: list[str],
    alpha: Tensor,
    watch: Callable[[int], None],
) -> Measured:
    """Return COLUMNS of every domain, over the places held out.

    `kl merged` is KL(fused || merged), `kl base` KL(fused || base), in nats a token; `agreement` is
    the share of places whose likeliest token is the same in both.
    """
    found: Measured = {}
    for part in collection.texts.parts:
        if part.held:
            rows = list(rows_of(speaker, collection, names, alpha, part, watch))
            sums = exact_sum(rows)
            found[part.domain] = dict(zip(COLUMNS, (sums[1:] / sums[0]).tolist(), strict=True))
    return found


def rows_of(
    speaker: Speaker,
    collection: Collection,
    names: list[str],
    alpha: Tensor,
    part: Part,
    watch: Callable[[int], None],
) -> Iterator[Tensor]:
    """Yield (n, 7) of the places of a part: weight, and by it each of COLUMNS."""
    starts = places_of(part)
    for group in batches(part.samples):
        logs, _ = said(speaker, [part.samples[i] for i in group], collection.shape.vocabulary)
        spans = [(starts[i], starts[i] + scored(part.samples[i])) for i in group]
        at = 0
        for heard in Recorded(collection, names, spans):
            n = len(heard.targets)
            merged = logs[at : at + n].double()
            at += n
            base = torch.log_softmax(heard.base.double(), -1)
            fused = fuse(base, shifts(heard.tuned, heard.small), alpha)
            came = heard.targets[:, None]
            nats = [-x.gather(1, came)[:, 0] for x in (base, fused, merged)]
            same = (fused.argmax(-1) == merged.argmax(-1)).double()
            table = torch.stack([*nats, forward_kl(fused, merged), forward_kl(fused, base), same])
            weights = heard.weights.double()
            yield torch.cat([weights[None], weights * table]).T
        watch(at)


def places_of(part: Part) -> list[int]:
    """Return where the places of each sample of a part begin."""
    starts = [part.start]
    for sample in part.samples:
        starts.append(starts[-1] + scored(sample))
    return starts[:-1]


def excess(found: Measured) -> float:
    """Return how many times as far as allowed the worst domain is; up to 1 all are near.

    Far is what KL(fused || merged) says, or the nats of the tokens that came.
    """
    return max(max(_divergence(m), _loss(m)) for m in found.values())


def _divergence(m: Mapping[str, float]) -> float:
    return m["kl merged"] / max(NEAR, SHARE * m["kl base"])


def _loss(m: Mapping[str, float]) -> float:
    return (m["nats merged"] - m["nats fused"]) / max(WORSE, SHARE * m["nats fused"])


def report(found: Measured) -> dict[str, Any]:
    """Return it for JSON."""
    return {"by_domain": found, "near": excess(found) <= 1}
