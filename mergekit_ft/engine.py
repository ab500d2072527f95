"""The engine: plan -> sources -> blocks -> operator -> writer -> checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ft import __version__
from mergekit_ft.blocks import Crew, Span, block_bytes, block_size, longest, view_of, whole
from mergekit_ft.checkpoint import card, conflicts, layout, lock, sides
from mergekit_ft.checkpoint.digests import Digests, Following
from mergekit_ft.errors import OperatorError, SourceError, WriteError
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.passes import Passes
from mergekit_ft.plan import read
from mergekit_ft.resolution import Ref, Resolution, Task
from mergekit_ft.rounding import Rounding, kept, rounding_notes
from mergekit_ft.sources import SourceFile
from mergekit_ft.sources.dtypes import SIZE
from mergekit_ft.sources.sides import PLAN
from mergekit_ft.stages import resolve
from mergekit_ft.writer import Writer

CARD, INDEX = "README.md", "model.safetensors.index.json"

Words = Mapping[str, Any]
PlanLike = str | os.PathLike[str] | Words | Sequence[Words]


@dataclass(frozen=True)
class Result:
    """What a merge made."""

    out: Path
    tensors: int
    changed: int  # tensors that differ from the base
    bytes_read: int
    bytes_written: int
    notes: list[str] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)


def merge(
    plan: PlanLike, out: str | os.PathLike[str], *, progress: Progress | None = None, **options: Any
) -> Result:
    """Carry out a plan (a file, its text, or mappings) and write the checkpoint to `out`.

    Options are the fields of `Options`. Raises `MergekitError` and leaves no `out` behind.
    """
    chosen, watcher = Options(**options), progress or Unwatched()
    resolution = resolve_plan(plan, chosen)
    try:
        return run(resolution, Path(out), chosen, watcher)
    finally:
        watcher.close()
        resolution.close()


class Story:
    """What is told beside the weights: that they are a merge."""

    what = "merging"

    def files(self, resolution: Resolution) -> Mapping[str, bytes]:
        """Return files to write besides the base's; line ends of a plan as they were written."""
        return {PLAN: resolution.plan.text.encode()}

    def receipt(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """Return the receipt with what more there is to say."""
        return receipt

    def card(self, resolution: Resolution, receipt: Mapping[str, Any]) -> str:
        """Return the README.md."""
        return card.card(resolution, receipt)


def run(
    resolution: Resolution,
    out: Path,
    options: Options,
    watcher: Progress,
    story: Story | None = None,
) -> Result:
    """Stream every tensor past its operator into the writer, then commit."""
    told = story or Story()
    _refuse_sources_as_out(resolution, out)
    resolution.notes += sides.notes(resolution, copy_code=options.copy_code)
    files = layout.out_files(resolution, options.max_shard_size)
    passes = passes_for(resolution, options)
    passes.advance = watcher.advance
    writer = Writer(out, files, _identity(resolution, options), options.resume, options.overwrite)
    with Digests(passes.crew.threads) as digests, writer:
        if writer.complete:
            writer.commit({})
            return _result(resolution, out, lock.read(out))
        hashing = {
            file.name: digests.follow(writer.part / file.name, writer.growth(file.name))
            for file in files
        }
        passes.touch = lambda ref: _start(digests, ref)
        passes.findings, passes.rounding = writer.findings, Rounding()
        watcher.start(_bytes_to_move(passes, writer), f"{told.what} into {out}")
        passes.survey_model(writer.note_finding)
        sink = _IntoFiles(writer, hashing, passes.rounding)
        passes.merge(sink, lambda task: task.name in writer.changed)
        _require_change(resolution, writer, options)
        resolution.notes += rounding_notes(resolution.tasks, writer.rounded)
        receipt = _surround(resolution, writer, digests, options, told)
        writer.commit(receipt)
    return _result(resolution, out, receipt)


def _start(digests: Digests, ref: Ref) -> None:
    for file in ref.source.behind(ref.name):
        digests.start(file.path)


class _IntoFiles:
    """Hands tensors to the writer, and to those who hash its files."""

    def __init__(self, writer: Writer, hashing: Mapping[str, Following], rounded: Rounding) -> None:
        self._writer, self._hashing, self._rounded = writer, hashing, rounded

    def put(self, task: Task, span: Span, out: Tensor) -> None:
        data = view_of(out)
        file, position = self._writer.write(task.name, span.start * SIZE[task.dtype], data)
        self._hashing[file].advance(position, data)

    def finish(self, task: Task, changed: bool) -> None:
        rounded = self._rounded.of(task.name)
        self._writer.finish(task.name, task.nbytes, changed, rounded)


def resolve_plan(plan: PlanLike, options: Options) -> Resolution:
    """Read a plan and find its tensors; what differs between the configs becomes a note."""
    reading = read(plan, lenient=options.lenient)
    resolution = resolve(reading, offline=options.offline, allow_pickle=options.allow_pickle)
    try:
        if options.strict:
            conflicts.require_none(resolution)
    except BaseException:
        resolution.close()
        raise
    resolution.notes += conflicts.conflicts(resolution)
    return resolution


def passes_for(resolution: Resolution, options: Options) -> Passes:
    """Return the passes over a resolution's tasks, in blocks that keep to the budget."""
    merged = resolution.merged
    threads = 1 if any(map(whole, merged)) else options.workers  # one whole tensor at a time
    crew = Crew(threads, options.torch_device)
    memory = options.memory - threads * sum(s.reader.overhead for s in resolution.sources)
    size = block_size(merged, memory, threads)
    blocks = max((block_bytes(task, longest(task, size)) for task in merged), default=0)
    return Passes(
        resolution.tasks,
        size,
        crew,
        allow_non_finite=options.allow_non_finite,
        spare=max(0, memory // threads - blocks),
        base=resolution.base,
    )


def _surround(
    resolution: Resolution, writer: Writer, digests: Digests, options: Options, story: Story
) -> dict[str, Any]:
    """Write what lies around the weights and return the receipt."""
    part = writer.part
    names = [*writer.sizes(), *sides.copy_sides(resolution, part, copy_code=options.copy_code)]
    if (index := layout.index_json(resolution, list(writer.files))) is not None:
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (part / INDEX).write_text(text, encoding="utf-8")
        names.append(INDEX)
    for name, content in story.files(resolution).items():
        (part / name).write_bytes(content)
        names.append(name)
    outputs = {name: _recorded(part / name, digests) for name in names}
    inputs = {
        str(source): {name: _identified(file, digests) for name, file in source.inputs.items()}
        for source in resolution.leaves
    }
    parts = (inputs, writer.findings, options.kept(), writer.changed)
    text = story.card(resolution, story.receipt(lock.receipt(resolution, outputs, *parts)))
    (part / CARD).write_text(text, encoding="utf-8")
    outputs[CARD] = _recorded(part / CARD, digests)
    return story.receipt(lock.receipt(resolution, outputs, *parts))


def _recorded(path: Path, digests: Digests) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": digests.of(path)}


def _identified(file: SourceFile, digests: Digests) -> dict[str, Any]:
    """Return size and digest of a source's file; the digest must be the hub's, if it states one."""
    digest, now = digests.of(file.path), file.path.stat()
    if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
        raise SourceError(
            f"{file.path}: changed while it was merged: start again when nothing writes to it"
        )
    if file.sha256 not in (None, digest):
        raise SourceError(
            f"{file.path}: its SHA-256 is {digest}, but the hub states {file.sha256}; delete the "
            "file and fetch it again"
        )
    return {"size": file.size, "sha256": digest}


def _identity(resolution: Resolution, options: Options) -> str:
    """Return what two runs share exactly when one may finish the other's work."""
    words = {
        "version": __version__,
        "plan": resolution.plan.text,
        "options": options.kept(),
        "sources": [[s.reference, s.revision, s.fingerprint()] for s in resolution.sources],
        "tokenizer": dict(resolution.donor.around.tokens),
        "tasks": [[task.name, task.dtype, str(task.operator)] for task in resolution.tasks],
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def _refuse_sources_as_out(resolution: Resolution, out: Path) -> None:
    """Refuse an OUT that would replace a model, or come along as one of its side files."""
    place = out.resolve()
    for source in resolution.leaves:
        single = [] if source.folder else [file.path for file in source.inputs.values()]
        for path in [source.folder] if source.folder else single:
            real = path.resolve()
            if real.is_relative_to(place) or place.is_relative_to(real):
                raise WriteError(
                    f"{out} is, holds or lies in {source.reference}, which the plan reads; name "
                    "another folder"
                )


def _require_change(resolution: Resolution, writer: Writer, options: Options) -> None:
    if resolution.stack is not None and resolution.stack.moves:
        return  # layers in other places are change enough
    if resolution.merged and not any(writer.changed.values()) and not options.allow_unchanged:
        same = resolution.base or resolution.donor
        left = kept(resolution.tasks, writer.rounded)
        if left is not None:
            raise OperatorError(
                f"nothing changed: every tensor equals {same.reference}, for the plan asks less "
                "than half a step of the dtypes that are stored; raise the weights, or store "
                "`out_dtype: float32`; or give --allow-unchanged"
            )
        raise OperatorError(
            f"nothing changed: every tensor equals {same.reference}; check the weights and "
            "that the models differ from their base, or give --allow-unchanged"
        )


def _bytes_to_move(passes: Passes, writer: Writer) -> int:
    """Return the bytes that the merge reads and writes, and a survey of the model at least."""
    left = [task for task in passes.tasks if task.name not in writer.changed]
    merge = sum(task.bytes_read + task.nbytes for task in left)
    surveys = sum(next(survey, None) is not None for survey in passes.surveys().values())
    return merge + surveys * sum(task.bytes_read for task in passes.tasks if task.surveyed)


def _result(resolution: Resolution, out: Path, receipt: dict[str, Any]) -> Result:
    tasks = resolution.tasks
    return Result(
        out,
        tensors=len(tasks),
        changed=sum(receipt["changed"].values()),
        bytes_read=sum(task.bytes_read for task in tasks),
        bytes_written=sum(task.nbytes for task in tasks),
        notes=resolution.notes,
        receipt=receipt,
    )
