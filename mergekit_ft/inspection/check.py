"""What a plan would do, from headers alone: inputs, bytes, memory, files, parameters, notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mergekit_ft.blocks import block_bytes, block_size, longest, whole
from mergekit_ft.checkpoint import conflicts, layout, sides
from mergekit_ft.contract import About, Survey
from mergekit_ft.inspection import settings
from mergekit_ft.inspection.tables import count, size
from mergekit_ft.plan import read
from mergekit_ft.resolution import Resolution, Task
from mergekit_ft.resolution.stack import drawn
from mergekit_ft.resolution.stack import lines as stack_lines
from mergekit_ft.stages import resolve

if TYPE_CHECKING:
    from mergekit_ft.options import Options
    from mergekit_ft.sources import Source

Report = dict[str, Any]


def check(plan: Any, options: Options) -> tuple[Report, Resolution]:
    """Return the report of a plan and the resolution it speaks of; raises every fault at once."""
    opening = {"offline": options.offline, "allow_pickle": options.allow_pickle}
    resolution = resolve(read(plan, lenient=options.lenient), headers_only=True, **opening)
    try:
        if options.strict:
            conflicts.require_none(resolution)
        return report(resolution, options), resolution
    finally:
        resolution.close()


def report(resolution: Resolution, options: Options) -> Report:
    """Return what a resolution says of the merge to come."""
    tasks, plan = resolution.tasks, resolution.plan
    copied = sum(task.copy is not None for task in tasks)
    return {
        "plan": plan.file,
        "method": plan.merge_method,
        "then": [step.method for step in plan.then],
        "sources": [_source(source, resolution) for source in resolution.sources],
        "slices": list(drawn(resolution.stack)) if resolution.stack is not None else [],
        "stages": {name: _stage(part) for name, part in resolution.stages.items()},
        "tensors": {
            "output": len(tasks),
            "merged": len(tasks) - copied,
            "copied": copied,
            "unused": resolution.unused,
        },
        "dtypes": _dtypes(resolution),
        "bytes": _bytes(resolution),
        "memory": _memory(resolution, options),
        **_output(resolution, options),
        "tokenizer": dict(resolution.donor.around.tokens) or None,
        "parameters": settings.as_json(settings.rows(resolution)),
        "notes": notes(resolution, options),
    }


def notes(resolution: Resolution, options: Options) -> list[str]:
    """Return what a user should know."""
    found = conflicts.conflicts(resolution)
    return [*resolution.notes, *found, *sides.notes(resolution, copy_code=options.copy_code)]


def _source(source: Source, resolution: Resolution) -> Report:
    roles = {
        "base": source is resolution.base,
        "tuned": any(source is member for member in resolution.members),
        "donor": source is resolution.donor,
    }
    return {
        "reference": source.reference,
        "revision": source.revision,
        "folder": str(source.folder) if source.folder is not None else None,
        "roles": [role for role, held in roles.items() if held],
        "tensors": len(source),
        "bytes": sum(info.nbytes for info in source.values()),
        "files": len(source.files),
    }


def _stage(part: Resolution) -> Report:
    """Return what a stage merges; its values are made as they are read, and never written."""
    return {
        "method": part.plan.merge_method,
        "then": [step.method for step in part.plan.then],
        "sources": [_source(source, part) for source in part.sources],
        "merged": len(part.merged),
        "parameters": settings.as_json(settings.rows(part)),
    }


def _dtypes(resolution: Resolution) -> list[Report]:
    """Return what is read, computed in and stored, with the number of tensors."""
    found = Counter(
        (tuple(sorted({ref.info.dtype for ref in (t.base, *t.tuned) if ref})), t.bits, t.dtype)
        for t in resolution.merged
        if t.copy is None
    )
    return [
        {"read": list(read), "computed": f"float{bits}", "stored": stored, "tensors": number}
        for (read, bits, stored), number in found.items()
    ]


def _bytes(resolution: Resolution) -> Report:
    """Return the bytes moved, and how often; surveys read what they look at at least once more."""
    tasks = resolution.tasks
    by_tensor = [task for task in resolution.merged if _surveys_itself(task)]
    over_model = list(_surveys_over_model(resolution))
    seen = sum(task.bytes_read for task in resolution.merged if task.surveyed)
    return {
        "read": sum(task.bytes_read for task in tasks),
        "write": sum(task.nbytes for task in tasks),
        "surveyed_tensors": len(by_tensor),
        "surveys_over_model": over_model,
        "read_by_surveys_at_least": sum(task.bytes_read for task in by_tensor)
        + seen * len(over_model),
    }


def _surveys_itself(task: Task) -> bool:
    operator = task.operator
    if operator is None or task.copy is not None or operator.survey_scope == "model":
        return False
    return _asks(operator.survey(task.about()))


def _surveys_over_model(resolution: Resolution) -> Iterator[str]:
    """Yield the methods that must see the whole model before the merge."""
    first = next((task for task in resolution.merged if task.surveyed), None)
    if first is None or first.operator is None:
        return
    about = About(first.ids, sum(task.numel for task in resolution.merged if task.surveyed))
    if first.operator.survey_scope == "model" and _asks(first.operator.survey(about)):
        yield resolution.plan.merge_method
    for step, adjustment in zip(resolution.plan.then, first.then, strict=True):
        if _asks(adjustment.follow(about)):
            yield step.method


def _asks(survey: Survey) -> bool:
    """Say whether a survey asks for a pass at all."""
    return next(survey, None) is not None


def _memory(resolution: Resolution, options: Options) -> Report:
    """Return what the blocks will take beside the interpreter."""
    merged = resolution.merged
    at_once = [task for task in merged if whole(task)]
    threads = 1 if at_once else options.workers
    overhead = sum(source.reader.overhead for source in resolution.sources)
    elements = block_size(merged, options.memory - threads * overhead, threads)
    needs = (block_bytes(task, longest(task, elements)) for task in merged)
    return {
        "budget": options.memory,
        "threads": threads,
        "block_elements": elements,
        "peak": threads * (overhead + max(needs, default=0)),
        "whole_tensors": len(at_once),
    }


def _output(resolution: Resolution, options: Options) -> Report:
    files = layout.out_files(resolution, options.max_shard_size)
    found = sides.listing(resolution)
    return {
        "files": [
            {
                "name": file.name,
                "tensors": len(file.entries),
                "bytes": len(file.header()) + sum(entry.nbytes for entry in file.entries),
            }
            for file in files
        ],
        "index": layout.index_json(resolution, files) is not None,
        "side_files": list(found.copied.values()),
        "custom_code": list(found.code),
    }


def lines(report: Report, resolution: Resolution) -> Iterator[str]:
    """Yield the report as text."""
    then = "".join(f", then {name}" for name in report["then"])
    yield f"{report['plan']}: {report['method']}{then}"
    for source in report["sources"]:
        yield _source_line(source)
    if report["slices"]:
        yield "stack:"
        yield from stack_lines(report["slices"])
    for name, stage in report["stages"].items():
        then = "".join(f", then {method}" for method in stage["then"])
        yield f"  {name} is made as it is read: {stage['method']}{then}"
        yield from (f"  {_source_line(source)}" for source in stage["sources"])
    tensors, moved, memory = report["tensors"], report["bytes"], report["memory"]
    unused = sum(map(len, tensors["unused"].values()))
    yield (
        f"output: {count(tensors['output'], 'tensor')}: {tensors['merged']:,} merged, "
        f"{tensors['copied']:,} copied; {unused:,} of the sources not used"
    )
    for kind in report["dtypes"]:
        read_as, number = " + ".join(kind["read"]), count(kind["tensors"], "tensor")
        yield f"dtypes: {read_as} -> {kind['computed']} -> {kind['stored']}, {number}"
    yield f"bytes: {size(moved['read'])} to read, {size(moved['write'])} to write"
    yield from _pass_lines(moved)
    whole_ones = memory["whole_tensors"]
    held = f", {count(whole_ones, 'tensor')} held whole" if whole_ones else ""
    yield (
        f"memory: {size(memory['peak'])} for blocks of {memory['block_elements']:,} elements on "
        f"{count(memory['threads'], 'thread')}{held} (--memory {size(memory['budget'])})"
    )
    yield from _file_lines(report)
    yield "parameters:"
    yield from settings.lines(settings.rows(resolution), resolution.ids)
    yield from (f"note: {note}" for note in report["notes"])


def _source_line(source: Report) -> str:
    revision = f"@{source['revision']}" if source["revision"] else ""
    held = f"{count(source['tensors'], 'tensor')}, {size(source['bytes'])}"
    words = {"base": "base", "tuned": "merged", "donor": "config and side files from here"}
    roles = ", ".join(words[role] for role in source["roles"])
    return (
        f"  {source['reference']}{revision}: {held} in {count(source['files'], 'file')} ({roles})"
    )


def _pass_lines(moved: Report) -> Iterator[str]:
    yield "passes: one to merge"
    if moved["surveyed_tensors"]:
        yield f"  before it, {count(moved['surveyed_tensors'], 'tensor')} surveyed one by one"
    for method in moved["surveys_over_model"]:
        yield f"  before it, {method} surveys the whole model"
    if moved["read_by_surveys_at_least"]:
        yield f"  surveys read at least {size(moved['read_by_surveys_at_least'])} more"


def _file_lines(report: Report) -> Iterator[str]:
    index = " and an index" if report["index"] else ""
    yield f"files: {count(len(report['files']), 'safetensors file')}{index}"
    for file in report["files"]:
        yield f"  {file['name']}: {count(file['tensors'], 'tensor')}, {size(file['bytes'])}"
    if report["side_files"]:
        yield f"  side files: {', '.join(report['side_files'])}"
