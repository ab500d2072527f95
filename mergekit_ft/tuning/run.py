"""tune(): a plan -> rows -> phases of training -> what was learned, written once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergekit_ft import __version__
from mergekit_ft.data.batches import Groups, grouped
from mergekit_ft.data.rows import Encoder, Row, read_rows
from mergekit_ft.deltas.writing import SUFFIX
from mergekit_ft.errors import PlanError, SourceError, WriteError
from mergekit_ft.learning import Objective, Tuner
from mergekit_ft.models.opening import Base, open_base, quiet
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.plan.tuning import TunePlan, read_tune
from mergekit_ft.tuning.adapters import merged, require_plain, write_adapter
from mergekit_ft.tuning.company import Company, company_of
from mergekit_ft.tuning.outputs import TuneStory, write_delta, write_full
from mergekit_ft.tuning.phases import Phases
from mergekit_ft.tuning.watching import write_curves


@dataclass(frozen=True)
class Tuned:
    """What a tuning made."""

    out: Path
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tune(
    plan: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    show: str = "nothing",
    progress: Progress | None = None,
    **options: Any,
) -> Tuned:
    """Carry out a tune plan and write what was learned to `out`.

    Options are the fields of `Options`; `show` is lines, json or nothing. Raises `MergekitError`; a
    stopped run leaves OUT.work, from which `resume` goes on to the same weights.
    """
    chosen, to = Options(**options), Path(out)
    with quiet():
        return _tuned(plan, to, chosen, show, progress or Unwatched())


def _tuned(
    plan: str | os.PathLike[str] | Mapping[str, Any],
    to: Path,
    chosen: Options,
    show: str,
    watcher: Progress,
) -> Tuned:
    words, tuner, objective = read_tune(plan).accepted()
    company = company_of(chosen.torch_device)
    output = words.output or tuner.gives[0]
    _refuse_what_is_there(to, output, chosen)
    if output == "adapter":
        require_plain(words)
    rows = _rows(words, objective)
    base = open_base(words.base, offline=chosen.offline)
    notes: list[str] = []
    train, validation = _samples(words, objective, base, rows, notes)
    work = _work(to, _identity(words, tuner, base, chosen, company.size), chosen, company)
    phases = Phases(words, tuner, objective, base, train, validation, chosen, work, show, company)
    facts = phases.train()
    if not company.leads:
        company.wait()
        return Tuned(to, facts, notes)
    try:
        _write(output, words, base, phases, facts, work, to, chosen, watcher)
    finally:
        watcher.close()
    shutil.rmtree(work)
    company.wait()
    return Tuned(to, facts, notes)


def _write(
    output: str,
    plan: TunePlan,
    base: Base,
    phases: Phases,
    facts: dict[str, Any],
    work: Path,
    out: Path,
    options: Options,
    watcher: Progress,
) -> None:
    """Write what was learned, as the plan asks."""
    adaptation, curves = phases.adaptation, phases.entries
    story = TuneStory(plan, facts, work, tuple(write_curves(curves, work)))
    if output == "adapter" and adaptation is not None:
        write_adapter(base.source, adaptation, out, story, options)
        return
    held = phases.held() if adaptation is None else merged(base.source, adaptation, work)
    if output == "delta":
        write_delta(base.source, held, out, plan, facts, curves, options, watcher)
    else:
        write_full(plan.base, held, out, story, options, watcher)


def _refuse_what_is_there(out: Path, output: str, options: Options) -> None:
    if (output == "delta") != (out.suffix == SUFFIX):
        wanted = f"a file that ends in {SUFFIX}" if output == "delta" else "a folder"
        raise WriteError(f"{out}: the plan gives a {output} output, which is {wanted}")
    if os.path.lexists(out) and not options.overwrite:
        raise WriteError(f"{out} exists; give --overwrite, or another name")


def _rows(plan: TunePlan, objective: Objective) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those held back."""
    data, rows = plan.data, read_rows(plan.data.train)
    if (rows[0].shape == "pair") != objective.pairs:
        wants = "pairs (prompt, chosen, rejected)" if objective.pairs else "single answers"
        raise PlanError(f"{plan.objective.method} learns from {wants}; see {rows[0].where}")
    if isinstance(data.validation, tuple):
        other = read_rows(data.validation)
        if other[0].shape != rows[0].shape:
            raise SourceError(
                f"{other[0].where}: a row of {other[0].shape}, where {rows[0].where} is one of "
                f"{rows[0].shape}"
            )
        return rows, other
    if data.validation is None:
        return rows, []
    return _split(rows, float(data.validation), plan.training.seed)


def _split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold a share of the rows back, drawn by the seed."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise SourceError(f"{rows[0].where}: {len(rows)} rows are too few to hold some back")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [row for i, row in enumerate(rows) if i in held]


def _samples(
    plan: TunePlan,
    objective: Objective,
    base: Base,
    rows: tuple[list[Row], list[Row]],
    notes: list[str],
) -> tuple[Groups, Groups]:
    """Return both parts of the rows as tokens."""
    data = plan.data
    encoder = Encoder(base.tokenizer, data.rows, data.max_length, data.packing)
    train, validation = (grouped(encoder.samples(part), objective.pairs) for part in rows)
    if encoder.cut:
        notes.append(
            f"{len(encoder.cut)} rows are longer than max_length {data.max_length} and were cut; "
            f"the first is {encoder.cut[0]}"
        )
    return train, validation


def _identity(plan: TunePlan, tuner: Tuner, base: Base, options: Options, processes: int) -> str:
    """Return what two runs share exactly when one may finish the other's work."""
    data = plan.data
    named = [*data.train, *(data.validation if isinstance(data.validation, tuple) else ())]
    named += [file for file in tuner.files if Path(file).expanduser().is_file()]
    digests = [hashlib.sha256(Path(f).expanduser().read_bytes()).hexdigest() for f in named]
    words: list[Any] = [__version__, plan.text, base.source.fingerprint(), digests]
    words += [options.torch_device.type, processes]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _work(out: Path, identity: str, options: Options, company: Company) -> Path:
    """Return the folder of what a stopped run leaves, emptied unless that goes on."""
    work = out.with_name(out.name + ".work")
    if company.leads:
        _begun(work, identity, options)
    company.wait()
    return work


def _begun(work: Path, identity: str, options: Options) -> None:
    mark = work / "identity"
    try:
        if options.resume and mark.is_file():
            if mark.read_text() != identity:
                raise WriteError(
                    f"{work} is of another plan, other data or another base: start without --resume"
                )
            return
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
        mark.write_text(identity)
    except OSError as error:
        raise WriteError(f"{work}: cannot be written: {error.strerror or error}") from error
