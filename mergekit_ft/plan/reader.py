"""A plan's file, text or mapping -> a reading of it, with every fault at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_ft.errors import Fault, PlanError
from mergekit_ft.plan import marks
from mergekit_ft.plan.checks import (
    adjustments,
    check_models,
    check_modules,
    check_slices,
    check_then,
    check_twice,
    method_of,
)
from mergekit_ft.plan.parameters import lookups
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.stages import linked
from mergekit_ft.plan.structure import build
from mergekit_ft.plan.tokenizers import check_tokenizer

Words = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def read(plan: str | os.PathLike[str] | Words, *, lenient: bool = False) -> Reading:
    """Return a plan given as a file, as YAML text, or as a mapping, and all its faults.

    Documents of a text, and mappings in a list, are stages; the reading is of the last one made.
    A lenient reading sets aside, with a remark, what mergekit 0.1.5 reads without effect.
    """
    if isinstance(plan, Mapping):
        plan = [plan]
    if isinstance(plan, Sequence) and not isinstance(plan, str):
        trees = [marks.of_value(dict(stage)) for stage in plan]
        text = yaml.safe_dump_all([tree.value for tree in trees], sort_keys=False)
        return _read_trees(trees, "plan", text, lenient)
    try:
        text, file = load(plan)
    except PlanError as error:
        return Reading(None, error.faults, marks.Marks(), os.fspath(plan))
    return read_text(text, file, lenient=lenient)


def load(plan: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a plan and the file that it stands in."""
    if isinstance(plan, str) and _is_text(plan):
        return plan, "plan"
    file = os.fspath(plan)
    try:
        return Path(file).expanduser().read_bytes().decode("utf-8-sig"), file
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start}); a plan is a YAML file"
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        message = f"cannot be read: {reason}"
    raise PlanError([Fault(message, file)])


def read_text(text: str, file: str, *, lenient: bool = False) -> Reading:
    """Return the plan in a text that stands in a file."""
    trees = marks.documents(text, file, last=lenient)  # of two like keys, mergekit goes by the last
    return _read_trees(trees, file, text, lenient)


def _is_text(plan: str) -> bool:
    """Tell YAML from a file's name."""
    if "\n" in plan:
        return True
    return not os.path.exists(plan) and (": " in plan or plan.lstrip().startswith("{"))


def _read_trees(trees: list[marks.Tree], file: str, text: str, lenient: bool) -> Reading:
    """Read every document; all share one report."""
    placed = any(mark.line for mark in trees[0].marks.values())
    several = len(trees) > 1 and not placed  # then the file says which it is
    readings = [
        _read_tree(tree, f"{file}[{i}]" if several else file, text, lenient)
        for i, tree in enumerate(trees)
    ]
    faults = [fault for reading in readings for fault in reading.faults]
    remarks = [remark for reading in readings for remark in reading.remarks]
    for reading in readings:
        reading.faults, reading.remarks = faults, remarks
    output = linked(readings)
    faults.sort(key=lambda fault: (fault.line, fault.column))
    return output


def _read_tree(tree: marks.Tree, file: str, text: str, lenient: bool) -> Reading:
    reading = Reading(None, [], tree.marks, file, text, lenient=lenient)
    reading.take(tree.faults)
    if () not in tree.marks or (tree.value is None and tree.faults):
        return reading
    build(tree.value, reading)
    if reading.plan is not None:
        reading.plan.came_from(text, file)
        _check(reading)
    return reading


def _check(reading: Reading) -> None:
    method = method_of(reading)
    check_twice(reading)
    check_modules(reading)
    check_slices(reading)
    check_then(reading)
    check_tokenizer(reading)
    if method is None:
        adjustments(reading)
        return
    check_models(reading, method)
    reading.lookups = lookups(reading, method)
