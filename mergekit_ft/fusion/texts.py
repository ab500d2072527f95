"""Calibration rows -> tokens in an order of their own, some held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_ft.data.neutral import neutral_rows
from mergekit_ft.data.rows import SHAPES, UNSCORED, Encoder, Row, Sample, read_rows
from mergekit_ft.errors import SourceError
from mergekit_ft.plan.fusing import NEUTRAL, CalibrationWords

DOMAIN = "domain"  # a key of rows whose file is of several
TAGGED = {shape: (*keys, DOMAIN) for shape, keys in SHAPES.items() if shape != "pair"}
UNTAGGED = {shape: keys for shape, keys in SHAPES.items() if shape != "pair"}


@dataclass(frozen=True)
class Part:
    """Rows of a domain that are fitted on, or held out, and where their scored tokens stand."""

    domain: str
    held: bool
    samples: tuple[Sample, ...]
    start: int  # of its places among all

    @property
    def stop(self) -> int:
        """Return where its places end."""
        return self.start + sum(map(scored, self.samples))


@dataclass(frozen=True)
class Texts:
    """All parts, domain by domain; their order is the texts' own, not that of the files."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    balanced: bool = True  # whether the fitted places of each domain weigh the same together

    @property
    def places(self) -> int:
        """Return how many tokens are scored."""
        return self.parts[-1].stop

    def weights(self) -> list[float]:
        """Return the weight of every place; balanced, those fitted on in a domain add up to 1."""
        found: list[float] = []
        for part in self.parts:
            whole = sum(scored(sample) * sample.weight for sample in part.samples)
            unit = whole if self.balanced else 1.0
            for sample in part.samples:
                found += [sample.weight / unit] * scored(sample)
        return found

    @property
    def domains(self) -> list[str]:
        """Return the domains, the anchor last."""
        return list(dict.fromkeys(part.domain for part in self.parts))

    def spans(self, domains: Sequence[str], *, held: bool) -> list[tuple[int, int]]:
        """Return the runs of places of some domains."""
        return [(p.start, p.stop) for p in self.parts if p.domain in domains and p.held == held]

    def digest(self) -> str:
        """Return what two texts share exactly when they are the same."""
        words = [
            [p.domain, p.held, [[*s.tokens, s.labels, s.weight] for s in p.samples]]
            for p in self.parts
        ]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def scored(sample: Sample) -> int:
    """Return how many tokens are scored: the first has nothing before it."""
    return sum(label != UNSCORED for label in sample.labels[1:])


def read_texts(words: CalibrationWords, tokenizer: Any) -> Texts:
    """Return the calibration texts as tokens. SourceError where a domain holds too little."""
    encoder = Encoder(tokenizer, words.rows, words.max_length)
    parts: list[Part] = []
    notes: list[str] = []
    start = 0
    for domain, rows in _rows(words).items():
        found = _unique(encoder.samples(rows), words.seed)
        taken = _enough(found, words.positions)
        if len(taken) < len(found):
            notes.append(
                f"{domain}: {len(taken)} of {len(found)} rows hold the "
                f"{words.positions} positions that are asked for"
            )
        for held, samples in _split(domain, taken, words.held_out):
            parts.append(Part(domain, held, samples, start))
            start = parts[-1].stop
    if encoder.cut:
        notes.append(
            f"{len(encoder.cut)} rows are longer than max_length {words.max_length} and "
            f"were cut; the first is {encoder.cut[0]}"
        )
    return Texts(tuple(parts), tuple(notes), words.balanced)


def _rows(words: CalibrationWords) -> dict[str, list[Row]]:
    """Return the rows of each domain, the anchor last."""
    if isinstance(words.data, Mapping):
        found = {name: read_rows(files, UNTAGGED) for name, files in sorted(words.data.items())}
    else:
        found = {}
        for row in read_rows(words.data, TAGGED):
            found.setdefault(str(row.words[DOMAIN]), []).append(row)
        found = dict(sorted(found.items()))
        if NEUTRAL in found:
            raise SourceError(
                f"{found[NEUTRAL][0].where}: '{NEUTRAL}' is what the anchor is "
                "called; name the domain otherwise"
            )
    if words.anchor:
        anchored = words.anchor is not True
        found[NEUTRAL] = read_rows(words.anchor, UNTAGGED) if anchored else neutral_rows()
    return found


def _unique(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Return each text once, with the weights of its like added up, in an order drawn by seed."""
    found: dict[str, Sample] = {}
    for sample in samples:
        words = json.dumps([seed, sample.tokens, sample.labels])
        key = hashlib.sha256(words.encode()).hexdigest()
        like = found.get(key)
        weight = sample.weight + (like.weight if like is not None else 0.0)
        found[key] = replace(sample, weight=weight)
    return [found[key] for key in sorted(found)]


def _enough(samples: Sequence[Sample], places: int) -> list[Sample]:
    """Return the first samples, two at least, that hold so many places together, or all."""
    taken: list[Sample] = []
    count = 0
    for sample in samples:
        if count >= places and len(taken) > 1:
            break
        taken.append(sample)
        count += scored(sample)
    return taken


def _split(
    domain: str, samples: list[Sample], share: float
) -> list[tuple[bool, tuple[Sample, ...]]]:
    """Return the rows fitted on and those held out."""
    held = max(1, round(share * len(samples))) if share else 0
    if len(samples) <= held:
        raise SourceError(
            f"{domain}: {len(samples)} different rows are too few to hold some out; "
            "give more, or `held_out: 0`"
        )
    parts = [(False, tuple(samples[held:])), *([(True, tuple(samples[:held]))] if held else [])]
    if not all(sum(sample.weight for sample in part) > 0 for _, part in parts):
        raise SourceError(f"{domain}: rows have no weight; give some of them more than 0")
    return parts
