"""Rows drawn so that they are of all kinds, the better of each kind sooner (kMQ).

k-means with quality, and its iterative refinement (Yu et al. 2024, arXiv:2409.11378):

    rows are clustered by the model's own mean-pooled last hidden states of prompt and answer
    cluster j gets a share of the rows wanted by its size, in later rounds by w_j
    within it rows are drawn without replacement, by softmax(quality / temperature)
    after a round    w_j <- w_j s_j / sum_i w_i s_i,  s_j the mean gain of its rows of that round
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.algebra.clusters import clustered, silhouette
from mergekit_ft.data.rows import SHAPES, Encoder, Row, read_rows
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.models.pooling import pooled
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.options import Progress, Unwatched

Paths = Sequence[str | os.PathLike[str]]
WHOLE = {shape: keys for shape, keys in SHAPES.items() if shape != "pair"}
LEAST = 1e-3  # of the mean gain: what a cluster that gained less counts with


@dataclass(frozen=True)
class Selected:
    """What was drawn."""

    lines: list[str]  # of rows, as they stood, but for the key of their quality
    report: dict[str, Any] = field(default_factory=dict)  # what a next round goes on from


def select(
    speaker: ModelSpeaker,
    files: Paths,
    count: int,
    *,
    clusters: int | None = None,
    quality: str | None = None,
    temperature: float = 1.0,
    rows: str = "auto",
    max_length: int = 1024,
    batch: int = 16,
    seed: int = 0,
    after: Mapping[str, Any] | None = None,
    gains: Paths = (),
    progress: Progress | None = None,
) -> Selected:
    """Draw rows of JSONL files for a model to be tuned on.

    `quality` names a number that rows hold. `clusters` None takes the number of best silhouette
    among powers of two. `after` is the report of an earlier round, whose rows are not drawn again,
    and `gains` what each of them gained: rows of `{"gain": number}` in the order of its output.
    """
    _require_sense(temperature, quality, clusters, after)
    found = _read(files, quality)
    digest = hashlib.sha256("\n".join(row.line for row in found).encode()).hexdigest()
    left = _left(found, digest, after, gains)
    if not 1 <= count <= len(left):
        raise PlanError(f"count {count}: there are {len(left)} rows to draw from")
    if after is None:
        encoder = Encoder(speaker.tokenizer, rows, max_length)
        texts = [sample.tokens for sample in encoder.samples([one.row for one in found])]
        points = _points(speaker, texts, batch, progress or Unwatched())
        now = _Round(*_clustered(points, clusters, seed), cut=len(encoder.cut))
    else:
        now = _next(after, _gains(gains, len(after["drawn"])))
    budgets = allotted(now.shares, Counter(now.of[i] for i in left), count)
    dice = torch.Generator().manual_seed(seed + now.number)
    drawn = sorted(
        row
        for cluster, budget in budgets.items()
        for row in _drawn(
            [i for i in left if now.of[i] == cluster], budget, found, temperature, dice
        )
    )
    told = now.report() | {"rows": len(found), "digest": digest, "drawn": drawn}
    told["budgets"] = {str(j): budget for j, budget in budgets.items()}
    return Selected([found[i].kept for i in drawn], told)


def _require_sense(
    temperature: float,
    quality: str | None,
    clusters: int | None,
    after: Mapping[str, Any] | None,
) -> None:
    """Refuse what cannot be, and what would have no effect."""
    if temperature <= 0:
        raise PlanError(f"temperature {temperature:g}: must be above 0")
    if quality is None and temperature != 1:
        raise PlanError("temperature has no effect: without `quality` all rows are alike")
    if after is not None and clusters is not None:
        raise PlanError("clusters has no effect: a later round keeps those of the first")


@dataclass(frozen=True)
class _Round:
    """What a round draws by."""

    of: list[int]  # the cluster of each row
    silhouette: float
    shares: dict[int, float] = field(default_factory=dict)  # by cluster; else by size
    number: int = 1
    cut: int = 0  # rows that were longer than max_length
    earlier: list[int] = field(default_factory=list)  # rows drawn before

    def __post_init__(self) -> None:
        if not self.shares:
            sizes = sorted(Counter(self.of).items())
            self.shares.update({j: n / len(self.of) for j, n in sizes})

    def report(self) -> dict[str, Any]:
        """Return what a next round goes on from."""
        return {
            "round": self.number,
            "rows_cut": self.cut,
            "silhouette": self.silhouette,
            "weights": {str(j): share for j, share in self.shares.items()},
            "clusters": self.of,
            "earlier": self.earlier,
        }


def _next(after: Mapping[str, Any], gains: Sequence[float]) -> _Round:
    """Return the round after a round that gained this."""
    earlier = [*after["earlier"], *after["drawn"]]
    number, cut = int(after["round"]) + 1, int(after["rows_cut"])
    shares = _refined(after, gains)
    return _Round(list(after["clusters"]), after["silhouette"], shares, number, cut, earlier)


@dataclass(frozen=True)
class _Line:
    """A line of a file."""

    row: Row
    line: str
    quality: float
    kept: str  # what is written of it


def _read(files: Paths, quality: str | None) -> list[_Line]:
    """Return the rows, with the lines they stand in."""
    if quality in {key for keys in WHOLE.values() for key in keys}:
        raise PlanError(f"quality {quality!r}: is text of a row; name a key that holds a number")
    rows = read_rows(files, WHOLE, () if quality is None else (quality,))
    lines = [
        line
        for file in files
        for line in Path(file).expanduser().read_text(encoding="utf-8-sig").split("\n")
        if line.strip()
    ]
    return [_line(row, line, quality) for row, line in zip(rows, lines, strict=True)]


def _line(row: Row, line: str, quality: str | None) -> _Line:
    if quality is None:
        return _Line(row, line, 0.0, line)
    words = {key: word for key, word in row.words.items() if key != quality}
    return _Line(row, line, float(row.words[quality]), json.dumps(words, ensure_ascii=False))


def _left(
    found: Sequence[_Line], digest: str, after: Mapping[str, Any] | None, gains: Paths
) -> list[int]:
    """Return which rows were not drawn before."""
    if after is None:
        if gains:
            raise PlanError("gains are of an earlier round: name its report by `after`")
        return list(range(len(found)))
    if not {"round", "digest", "clusters", "drawn", "earlier", "weights"} <= after.keys():
        raise SourceError("after: is no report of `data select`")
    if after["digest"] != digest:
        raise SourceError("after: is of other rows; name the same files in the same order")
    gone = {*after["earlier"], *after["drawn"]}
    return [i for i in range(len(found)) if i not in gone]


def _points(
    speaker: ModelSpeaker, texts: Sequence[Sequence[int]], batch: int, progress: Progress
) -> torch.Tensor:
    progress.start(len(texts), "rows are read")
    try:
        return pooled(speaker, texts, batch=batch, watch=progress.advance)
    finally:
        progress.close()


def _clustered(points: torch.Tensor, clusters: int | None, seed: int) -> tuple[list[int], float]:
    """Return the cluster of each row, and how well they are apart."""
    distinct = len(torch.unique(points, dim=0))
    if clusters is not None and not 1 <= clusters <= distinct:
        raise PlanError(f"clusters {clusters}: there are {distinct} distinct rows")
    sizes = [clusters] if clusters is not None else _candidates(distinct)
    made = [clustered(points, size, seed) for size in sizes]
    apart = [silhouette(points, one) for one in made]
    best = max(range(len(made)), key=lambda i: apart[i])
    return made[best].of.tolist(), apart[best]


def _candidates(distinct: int) -> list[int]:
    """Return powers of two up to a quarter of the rows, 512 at most."""
    most = min(512, max(1, distinct // 4))
    return [2**i for i in range(1, most.bit_length()) if 2**i <= most] or [1]


def allotted(shares: Mapping[int, float], rooms: Mapping[int, int], count: int) -> dict[int, int]:
    """Return how many of `count` rows each cluster gives: by its share, by largest remainders.

    No more than it has room for; what one lacks is shared among the others.
    """
    found = dict.fromkeys(shares, 0)
    while count:
        free = {j: rooms.get(j, 0) - n for j, n in found.items() if rooms.get(j, 0) > n}
        whole = sum(shares[j] for j in free)
        wanted = {j: count * (shares[j] / whole if whole else 1 / len(free)) for j in free}
        given = {j: min(free[j], math.floor(wanted[j])) for j in free}
        rest = count - sum(given.values())
        for j in sorted(free, key=lambda j: (math.floor(wanted[j]) - wanted[j], j)):
            if rest and given[j] < free[j]:
                given[j], rest = given[j] + 1, rest - 1
        found = {j: n + given.get(j, 0) for j, n in found.items()}
        count = rest
    return found


def _drawn(
    rows: Sequence[int],
    budget: int,
    found: Sequence[_Line],
    temperature: float,
    dice: torch.Generator,
) -> list[int]:
    """Return some of a cluster's rows, by softmax of quality, none twice."""
    if not budget:
        return []
    quality = torch.tensor([found[i].quality for i in rows], dtype=torch.float64) / temperature
    noise = torch.rand(len(rows), dtype=torch.float64, generator=dice).clamp(min=1e-300)
    keys = quality - (-noise.log()).log()  # the largest of Gumbel's keys: softmax, none twice
    return [rows[i] for i in keys.topk(budget).indices.tolist()]


def _gains(files: Paths, count: int) -> list[float]:
    if not files:
        raise PlanError("after: a later round needs `gains`, of each row drawn in that one")
    rows = read_rows(files, {"gain": ()}, ("gain",))
    if len(rows) != count:
        raise SourceError(f"gains: {len(rows)} rows, of {count} rows drawn in that round")
    return [float(row.words["gain"]) for row in rows]


def _refined(after: Mapping[str, Any], gains: Sequence[float]) -> dict[int, float]:
    """Return clusters' weights after a round."""
    of = after["clusters"]
    by: dict[int, list[float]] = {}
    for row, gain in zip(after["drawn"], gains, strict=True):
        by.setdefault(of[row], []).append(gain)
    means = {j: sum(some) / len(some) for j, some in by.items()}
    usual = sum(max(0.0, s) for s in means.values()) / len(means)
    if usual == 0:
        raise SourceError("gains: no cluster gained anything, so there is nothing to go by")
    before = {int(j): float(w) for j, w in after["weights"].items()}
    raw = {j: w * max(means.get(j, usual), LEAST * usual) for j, w in before.items()}
    total = sum(raw.values())
    return {j: w / total for j, w in raw.items()}
