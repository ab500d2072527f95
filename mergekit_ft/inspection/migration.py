"""A mergekit plan made strict: what never had an effect there goes, what differs here is told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mergekit_ft import registry
from mergekit_ft.errors import Fault, MergekitError, PlanError
from mergekit_ft.plan import Plan, Reading, referred
from mergekit_ft.plan.pruning import embedded, stripped
from mergekit_ft.plan.reader import load, read_text
from mergekit_ft.plan.tokenizers import vocabulary_words
from mergekit_ft.stages import resolve

ROUNDS = 5  # what goes may leave something else without effect
SAME = re.compile(r",? as (?:in mergekit|mergekit(?:'s|s)? [^.;,]*)")


@dataclass(frozen=True)
class Migration:
    """A strict plan, and all that was found on the way to it."""

    file: str
    lines: tuple[int, int] | None  # of a model card, where the plan stands in one
    text: str
    removed: list[Fault]  # what mergekit 0.1.5 reads without effect
    differences: list[str]
    notes: list[str]
    faults: list[Fault]  # what has to be mended by hand; the text still holds it


def migrate(plan: str | os.PathLike[str], *, block: int | None = None, **opening: Any) -> Migration:
    """Return the strict plan that means what a file (a plan or a model card), or a text, does.

    `block` picks one of a card's plans, from 1. Sources that can be opened say which filters match.
    """
    text, file = load(plan)
    text, lines = _plan_in(text, file, block)
    reading, unopened = _resolved(text, file, opening, lenient=True)
    removed = sorted(reading.remarks, key=lambda fault: (fault.line, fault.column))
    faults = [fault for fault in reading.faults if fault.kind == "plan"]
    notes = [f"filters were not looked up, for {why}" for why in unopened]
    result, kept = _stripped(text, removed, opening)
    if not kept:
        notes.append("comments are lost: what goes stands in an anchor that others need")
    stages = [*reading.stages.values(), reading]
    told = [item for stage in stages if stage.plan is not None for item in _differences(stage.plan)]
    differences = list(dict.fromkeys(told))
    return Migration(file, lines, result.lstrip("\n"), removed, differences, notes, faults)


def _plan_in(text: str, file: str, block: int | None) -> tuple[str, tuple[int, int] | None]:
    """Return a plan's text, at its place, and the lines of the card around it."""
    is_card = file.lower().endswith((".md", ".markdown")) or re.search(r"(?m)^\s*(```|~~~)", text)
    if not is_card:
        if block is not None:
            raise PlanError([Fault("is a plan, not a model card: --block has no effect", file)])
        return text, None
    plans = embedded(text)
    if not plans:
        raise PlanError([Fault("no fenced block of this card holds a `merge_method:`", file)])
    if block is None and len(plans) > 1:
        places = ", ".join(f"{i} on line {line}" for i, (line, _) in enumerate(plans, 1))
        message = f"this card holds {len(plans)} plans ({places}): pick one with --block"
        raise PlanError([Fault(message, file)])
    if not 1 <= (block or 1) <= len(plans):
        raise PlanError([Fault(f"this card holds {len(plans)} plans; --block {block}?", file)])
    first, plan = plans[(block or 1) - 1]
    return "\n" * (first - 1) + plan, (first, first + plan.count("\n") - 1)


def _resolved(
    text: str, file: str, opening: dict[str, Any], *, lenient: bool
) -> tuple[Reading, list[str]]:
    """Read a plan, find its tensors where they can be found, and say why where they cannot."""
    reading = read_text(text, file, lenient=lenient)
    try:
        resolve(reading, headers_only=True, **opening).close()
    except PlanError:
        pass  # the reading has every fault
    except MergekitError as error:
        if all(fault.kind != "source" for fault in reading.faults):
            return reading, [str(error)]
    return reading, [fault.message for fault in reading.faults if fault.kind == "source"]


def _stripped(text: str, removed: list[Fault], opening: dict[str, Any]) -> tuple[str, bool]:
    """Return a plan without what has no effect, and whether its comments could be kept."""
    kept = True
    for _ in range(ROUNDS):
        if not removed:
            return text, kept
        text, whole = stripped(text, removed)
        kept &= whole
        reading, _ = _resolved(text, "plan", opening, lenient=False)
        removed = [fault for fault in reading.faults if fault.aside]
    raise PlanError([replace(fault, file="the plan so far") for fault in removed])


def _of_slices(plan: Plan) -> Iterator[str]:
    """Say where a stack's end is another."""
    stacks = [plan.slices, *(module.slices for module in plan.modules.values())]
    if any(stack and len(stack[-1].sources) > len(stack[0].sources) for stack in stacks):
        yield (
            "the norm and the head after the layers take every source of the last slice; mergekit "
            "takes only as many as the first slice has"
        )


def _differences(plan: Plan) -> Iterator[str]:
    """Say in what the merge differs from mergekit's, and why."""
    yield from _of_slices(plan)
    if plan.base_model is None and len({model.key for _, model in referred(plan)}) > 1:
        yield (
            "config, tokenizer and side files are the first model's; mergekit takes those of one "
            "of the models, and not always of the same"
        )
    if plan.stored_dtype is None:
        yield (
            "without `dtype:` each tensor is stored as in the base (without one: the first "
            "model); mergekit stores the widest dtype of its inputs"
        )
    if vocabulary_words(plan)[0] is not None:
        yield (
            "tokenizer: every token's row is the same; here new ids are the same in every run, "
            "rows without a token stay unless pad_to_multiple_of is given, and ordinary tokens of "
            "other models do not become added ones, so that text is cut as by the base"
        )
    yield "tensors that mergekit has no place for come out as in the base; it leaves them out"
    for method in dict.fromkeys([plan.merge_method, *(step.method for step in plan.then)]):
        with suppress(PlanError):
            yield from (f"{method}: {item}" for item in _told(registry.card(method)))


def _told(card: str) -> Iterator[str]:
    """Yield what a method's card says of mergekit where it differs."""
    _, _, rest = card.partition("## What differs\n")
    section, _, _ = rest.partition("\n## ")
    for item in re.split(r"(?m)^- ", section)[1:]:
        line = " ".join(item.split())
        if "mergekit" in SAME.sub("", line):
            yield line


def lines(found: Migration) -> Iterator[str]:
    """Yield what was found, as text; the plan itself is `found.text`."""
    if found.lines is not None:
        yield f"{found.file}: the plan on lines {found.lines[0]} to {found.lines[1]}"
    if found.removed:
        yield "without effect in mergekit 0.1.5, so not in the strict plan:"
        yield from (f"  {fault}" for fault in found.removed)
    elif not found.faults:
        yield "nothing in it is without effect in mergekit 0.1.5"
    if found.differences:
        yield "what differs here:"
        yield from (f"  {difference}" for difference in found.differences)
    yield from (f"note: {note}" for note in found.notes)


def as_json(found: Migration) -> dict[str, Any]:
    """Return what was found as JSON can hold it."""
    return {
        "file": found.file,
        "lines": found.lines,
        "plan": found.text,
        "removed": [_fault(fault) | {"what": fault.aside} for fault in found.removed],
        "differences": found.differences,
        "notes": found.notes,
        "faults": [_fault(fault) for fault in found.faults],
    }


def _fault(fault: Fault) -> dict[str, Any]:
    return {"line": fault.line, "column": fault.column, "message": fault.message}
