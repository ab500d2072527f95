"""How likely a model finds the scored tokens of samples, each given all true ones before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.data.rows import UNSCORED, Sample
from mergekit_ft.errors import OperatorError
from mergekit_ft.models.decoding import padded
from mergekit_ft.models.speaker import Speaker

MOST = 2048  # scored places whose logits are held at once, unless one row has more
CHUNK = 256  # places whose exponentials are
Watch = Callable[[int], None]  # hears of rows done


@dataclass(frozen=True)
class Scored:
    """What a model makes of the scored tokens of a sample."""

    nats: float  # minus the sum of their log-probabilities
    tokens: int
    right: int  # that are the likeliest, of equal ones the lowest


def scored(
    speaker: Speaker, samples: Sequence[Sample], batch: int, watch: Watch = lambda rows: None
) -> list[Scored]:
    """Return what is scored of each sample; batches are of like length, at most `batch` rows."""
    found: dict[int, Scored] = {}
    for places in _batches(samples, batch):
        group = [samples[i] for i in places]
        found.update(zip(places, _batch(speaker, group), strict=True))
        watch(len(places))
    return [found[i] for i in range(len(samples))]


def _batches(samples: Sequence[Sample], most: int) -> Iterator[list[int]]:
    """Yield places of samples of like length, longest first."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].tokens), i))
    held: list[int] = []
    places = 0
    for i in order:
        count = _count(samples[i])
        if held and (len(held) == most or places + count > MOST):
            yield held
            held, places = [], 0
        held, places = [*held, i], places + count
    if held:
        yield held


def _count(sample: Sample) -> int:
    """Return how many tokens are scored: the first has nothing before it."""
    return sum(label != UNSCORED for label in sample.labels[1:])


def _batch(speaker: Speaker, samples: list[Sample]) -> list[Scored]:
    tokens, mask = padded([sample.tokens for sample in samples], 0, left=False)
    labels, _ = padded([sample.labels for sample in samples], UNSCORED, left=False)
    at = torch.zeros_like(mask, dtype=torch.bool)
    at[:, :-1] = labels[:, 1:] != UNSCORED
    targets = labels[:, 1:][at[:, :-1]]  # (m,)
    nats, right = _likelihood(speaker.read(tokens, mask, at), targets)
    counts = at.sum(dim=1).tolist()
    rows = zip(torch.split(nats, counts), torch.split(right, counts), counts, strict=True)
    return [Scored(_sound(math.fsum(n.tolist())), c, int(r.sum())) for n, r, c in rows]


def _likelihood(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats of each target (m,) and whether it is the likeliest, on the host."""
    nats, right = [], []
    targets = targets.to(logits.device)
    for part, true in zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True):
        nats.append(part.logsumexp(dim=1) - part.gather(1, true[:, None])[:, 0])
        right.append(part.argmax(dim=1) == true)
    return torch.cat(nats).cpu(), torch.cat(right).cpu()


def _sound(nats: float) -> float:
    if not math.isfinite(nats):
        raise OperatorError(
            "the model gives a scored token no finite log-probability, so there is no loss"
        )
    return nats
