"""The passes over a model: the surveys that operators ask for, then the merge."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mergekit_ft.algebra.deltas import add_base
from mergekit_ft.blocks import Crew, Job, Piece, Span, Station, cut, load
from mergekit_ft.contract import About, Block, Finding, Measure, Survey
from mergekit_ft.errors import OperatorError
from mergekit_ft.resolution import Ref, Task
from mergekit_ft.rounding import Rounding
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import FLOATING, TORCH

SLAB = 2**20  # bytes

Tallied = Generator[list[Piece], None, Finding]


class Sink(Protocol):
    """Where merged tensors go."""

    def put(self, task: Task, span: Span, out: Tensor) -> None:
        """Take the (n,) stored values of a span."""

    def finish(self, task: Task, changed: bool) -> None:
        """Take note that a tensor is whole, and whether it differs from the base."""


class _Slabs:
    """Memory for what is kept of many blocks.

    Small parts that stay where they were made would keep what is freed around them in pieces, too
    small for the next block: memory would grow with a tensor's length.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0)

    def keep(self, part: Tensor) -> Tensor:
        """Return a copy that lies beside the others; their dtype is one."""
        n = part.numel()
        if n > len(self._free):
            self._free = torch.empty(max(n, SLAB // part.element_size()), dtype=part.dtype)
        kept, self._free = self._free[:n], self._free[n:]
        return kept.view(part.shape).copy_(part)


class _Total:
    """The sum of one measure over a stream of blocks."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._rows: dict[tuple[int, int], Tensor] = {}  # (task, start) -> (cells, s)
        self._tally: Tensor | None = None
        self._slabs = _Slabs()
        self._lock = threading.Lock()

    def add(self, order: int, block: Block) -> None:
        """Measure a block and add what it gives."""
        part = self.measure.of(block).cpu()
        if self.measure.host is not None:
            part = self.measure.host(block, part)
        with self._lock:
            if self.measure.cells:
                self._rows[order, block.start] = self._slabs.keep(part)
            else:
                self._tally = part if self._tally is None else self._tally.add_(part)

    def result(self) -> Tensor:
        """Return the tally, or (cells, s) the rows in the order of the stream."""
        if self.measure.cells:
            return torch.cat([self._rows[key] for key in sorted(self._rows)])
        assert self._tally is not None
        return self._tally


@dataclass
class Passes:
    """Streams tasks past their operators."""

    tasks: list[Task]
    size: int  # elements of a block
    crew: Crew
    advance: Callable[[int], None] = lambda nbytes: None  # told of every byte read and written
    touch: Callable[[Ref], None] = lambda ref: None  # told of every tensor before it is read
    allow_non_finite: bool = False
    spare: int = 2**62  # bytes that each survey may keep besides its blocks
    base: Source | None = None  # what the output is compared with where a task reads no base
    findings: dict[str, Any] = field(default_factory=dict)  # over the whole model, by operator
    rounding: Rounding | None = None  # who looks at values before they are rounded

    def surveys(self) -> dict[str, Survey]:
        """Return the surveys over the whole model that are still to be made, the merge's first."""
        merged = [task for task in self.tasks if task.surveyed and task.numel]
        operator = merged[0].operator if merged else None
        if operator is None:
            return {}
        bits = max(task.bits for task in merged)
        numel = sum(task.numel for task in merged)
        about = About(merged[0].ids, numel, bits=bits, spare=self.spare)
        model_wide = operator.survey_scope == "model"
        found = {"merge": operator.survey(about)} if model_wide else {}
        found |= {f"then.{i}": op.follow(about) for i, op in enumerate(merged[0].then)}
        return {key: survey for key, survey in found.items() if key not in self.findings}

    def survey_model(self, note: Callable[[str, Finding], Finding]) -> None:
        """Make the surveys over the whole model and tell `note` of each finding."""
        for key, survey in self.surveys().items():
            self.findings[key] = note(
                key, self._over(survey, 0 if key == "merge" else int(key[5:]))
            )

    def _over(self, survey: Survey, then: int) -> Finding:
        """Run a survey over the whole model, the delta as it is before operator `then`."""
        merged = [(order, task) for order, task in enumerate(self.tasks) if task.surveyed]
        try:
            measures = next(survey)
            while True:
                totals = [_Total(measure) for measure in measures]
                self.crew.run(self._measure(task, order, totals, then) for order, task in merged)
                measures = survey.send(tuple(total.result() for total in totals))
        except StopIteration as stop:
            return _plain(stop.value)

    def _measure(self, task: Task, order: int, totals: list[_Total], then: int) -> Job:
        """Pass a task's blocks by the measures; those of the merged delta come last."""
        finding = None
        if any(total.measure.merged for total in totals):
            finding = yield from self._finding(task)

        def piece(span: Span, station: Station) -> None:
            block = load(station, task, span)
            for total in totals:
                if total.measure.merged and block.delta is None:
                    block.delta = self._delta(task, block, finding, then)
                total.add(order, block)

        every = min(total.measure.every for total in totals)
        yield from self._pieces(task, piece, every=every)

    def _finding(self, task: Task) -> Tallied:
        """Return what the survey of a task's operator finds, making it if it is the tensor's."""
        operator = task.operator
        assert operator is not None
        if not task.numel:
            return None  # no block will ask for it
        if operator.survey_scope == "model":
            return self.findings["merge"]
        survey = operator.survey(task.about(self.spare))
        try:
            measures = next(survey)
            while True:
                totals = [_Total(measure) for measure in measures]

                def piece(span: Span, station: Station, totals: Any = totals) -> None:
                    block = load(station, task, span)
                    for total in totals:
                        total.add(0, block)

                every = min(measure.every for measure in measures)
                yield from self._pieces(task, piece, told=False, every=every)
                measures = survey.send(tuple(total.result() for total in totals))
        except StopIteration as stop:
            return stop.value

    def _pieces(
        self,
        task: Task,
        of: Callable[[Span, Station], None],
        *,
        told: bool = True,
        every: int = 1,
    ) -> Job:
        """Yield a piece for every span of a task; `advance` is told of those of whole passes."""
        for ref in (task.base, task.copy, *task.tuned):
            if ref is not None:
                self.touch(ref)
        share = task.bytes_read / max(task.numel, 1) if told else 0.0

        def piece(span: Span) -> Piece:
            def run(station: Station) -> None:
                of(span, station)
                self.advance(round(share * span.n))

            return run

        yield [piece(span) for span in cut(task, self.size, every)]

    def merge(self, sink: Sink, done: Callable[[Task], bool] = lambda task: False) -> None:
        """Merge every task that is not done and hand it to the sink."""
        self.crew.run(self._merge(task, sink) for task in self.tasks if not done(task))

    def _merge(self, task: Task, sink: Sink) -> Job:
        finding = None
        mine = (ref for ref in task.tuned if ref.source is self.base)
        base = task.base or next(mine, None)
        changed = [base is not None and _reshaped(base)]
        if task.copy is None:
            finding = yield from self._finding(task)

        def piece(span: Span, station: Station) -> None:
            out = self.values(task, span, station, finding)
            if not changed[0] and _differs(station, task, base, span, out):
                changed[0] = True  # by whichever worker sees it; nobody sets it back
            sink.put(task, span, out)
            self.advance(out.numel() * out.element_size())

        yield from self._pieces(task, piece)
        sink.finish(task, changed[0])

    def values(self, task: Task, span: Span, station: Station, finding: Finding) -> Tensor:
        """Return (n,) the stored values of a span, in the station's memory."""
        if task.copy is not None:
            out = self._copied(station, task, task.copy, span)
        else:
            out = self._merged(station, task, span, finding)
        self._require_finite(station, task, span, out)
        return out

    def finding(self, task: Task) -> Finding:
        """Return what the survey of a task finds; those over the whole model come before."""
        found = []

        def job() -> Job:
            found.append((yield from self._finding(task)))

        self.crew.run([job()])
        return found[0]

    def _merged(self, station: Station, task: Task, span: Span, finding: Finding) -> Tensor:
        block = load(station, task, span)
        out = station.stage(2, span.n, TORCH[task.dtype])
        values = self._values(task, block, finding)
        out.copy_(values.flatten(), non_blocking=station.device.type == "cuda")
        station.settle()
        if self.rounding is not None:
            self.rounding.see(task, block, values)
        return out

    def _values(self, task: Task, block: Block, finding: Finding) -> Tensor:
        """Return (n,) the merged values of a block."""
        operator = task.operator
        assert operator is not None
        idle = all(adjustment.neutral(task.known, task.place) for adjustment in task.then)
        if idle and (task.base is None or not operator.yields_delta):
            return operator.merge(block, finding)
        return add_base(block.base, self._delta(task, block, finding, len(task.then)))

    def _delta(self, task: Task, block: Block, finding: Finding, then: int) -> Tensor:
        """Return (n,) the delta after the first `then` operators that follow the merge."""
        operator = task.operator
        assert operator is not None
        delta = operator.merge(block, finding)
        if not operator.yields_delta:
            delta = delta.sub_(block.base)
        for i, adjustment in enumerate(task.then[:then]):
            block.delta = delta
            delta = adjustment.adjust(block, self.findings[f"then.{i}"])
        return delta

    def _copied(self, station: Station, task: Task, copy: Ref, span: Span) -> Tensor:
        """Return (n,) a source's own values, as bytes where the dtype stays."""
        if copy.info.dtype == task.dtype:
            out = station.read(copy, span, 2)
        else:
            raw = station.read(copy, span, 1)
            out = station.stage(2, span.n, TORCH[task.dtype])
            out.copy_(raw)
        if task.operator is None:
            for ref in task.tuned:
                if not same_bits(station.read(ref, span, 1), out):
                    raise OperatorError(
                        f"{task.name}: {ref.info.dtype} values do not merge, and those of "
                        f"{ref.source.reference} differ from {copy.source.reference}; make them "
                        "equal first"
                    )
        return out

    def _require_finite(self, station: Station, task: Task, span: Span, out: Tensor) -> None:
        if self.allow_non_finite or task.dtype not in FLOATING or finite(out):
            return
        for ref in {id(ref): ref for ref in (task.copy, task.base, *task.tuned) if ref}.values():
            raw = station.read(ref, span, 1).double()
            if not bool(raw.isfinite().all()):
                at = span.start + int(raw.isfinite().logical_not().nonzero()[0])
                raise OperatorError(
                    f"{ref.source.reference}: {ref.name} holds {float(raw[at - span.start])} at "
                    f"element {at}; repair the checkpoint, or --allow-non-finite lets it pass"
                )
        at = span.start + int(out.double().isfinite().logical_not().nonzero()[0])
        raise OperatorError(
            f"{task.name}: the merged value of element {at} does not fit {task.dtype} though all "
            "sources are finite; lower the weights, or store float32 or bfloat16 (`dtype:`)"
        )


def finite(values: Tensor) -> bool:
    """Say whether no element is NaN or Inf."""
    if values.dtype.itemsize == 1:
        values = values.float()
    least, most = (float(end) for end in torch.aminmax(values))
    return least > -math.inf and most < math.inf  # false for NaN, which is both ends


PROBE = 4096  # elements compared first: where a merge differs, it mostly does so early


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two host tensors have one dtype and hold the same bytes."""
    if one.dtype != other.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def _reshaped(base: Ref) -> bool:
    """Say whether a tensor of the base had another shape on disk: it has rows for other tokens."""
    stored = base.source.on_disk.get(base.name)
    return stored is not None and stored.shape != base.info.shape


def _differs(station: Station, task: Task, base: Ref | None, span: Span, out: Tensor) -> bool:
    """Say whether the output differs from the base; without a base it always does."""
    if base is None:
        return task.operator is not None
    if task.copy is base:
        return False
    probe = Span(span.start, min(span.start + PROBE, span.stop))
    return any(
        not same_bits(station.read(base, part, 0).to(out.dtype), out[: part.n])
        for part in (probe, span)
    )


def _plain(finding: Finding) -> Finding:
    """Return a finding as JSON would give it back, so that a resumed run sees the same."""
    if isinstance(finding, tuple | list):
        return [_plain(item) for item in finding]
    return finding
