"""Every model of a plan as it stands in the output's vocabulary; its files and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from mergekit_ft.plan import Reading
from mergekit_ft.plan.tokenizers import vocabulary_words
from mergekit_ft.sources import Source
from mergekit_ft.sources.derived import derived
from mergekit_ft.tokens.aligner import Aligner
from mergekit_ft.tokens.chat import template_change
from mergekit_ft.tokens.files import Sides
from mergekit_ft.tokens.unaligned import check_unaligned

Key = TypeVar("Key")


def by_token(reading: Reading, opened: Mapping[Key, Source]) -> Mapping[Key, Source]:
    """Return the sources to use, the donor first; what cannot be done is a fault."""
    if reading.plan is None or not opened:
        return opened
    words, path = vocabulary_words(reading.plan)
    if words is None:
        found = dict(opened) | check_unaligned(reading, opened)
    else:
        found = dict(Aligner(reading, opened, words, path).aligned())
    donor = next(iter(found))
    change = template_change(reading, found[donor], list(opened.values()))
    if change is not None:
        found[donor] = surrounded(found[donor], *change)
    return found


def surrounded(source: Source, sides: Sides, notes: tuple[str, ...]) -> Source:
    """Return a source with other side files."""
    made = derived(source, source.values(), source.reader, notes=notes)
    made.around = replace(made.around, replaced={**made.around.replaced, **sides})
    return made
