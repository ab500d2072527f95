"""edit(): a plan -> edits -> a few tensors rewritten -> a delta file, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.deltas.writing import SUFFIX
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.examining import Examination
from mergekit_ft.editing.facts import Edit, edit_of, read_edits
from mergekit_ft.editing.outputs import write_checkpoint, write_patch
from mergekit_ft.editing.rewritten import Rewritten
from mergekit_ft.editing.scores import Scores, compared, require_changed
from mergekit_ft.editing.solving import solve
from mergekit_ft.editing.training import teach
from mergekit_ft.errors import PlanError, SourceError, WriteError
from mergekit_ft.models.opening import around, open_base, quiet
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.plan.editing import EditPlan, read_edit
from mergekit_ft.recalling import Solver
from mergekit_ft.rewriting import Editor
from mergekit_ft.sources import Source
from mergekit_ft.sources.delta_file import open_delta
from mergekit_ft.sources.patched import tensor_hash
from mergekit_ft.teaching import Teacher


@dataclass(frozen=True)
class Edited:
    """What an editing made."""

    out: Path
    tensors: list[str]  # that changed
    nbytes: int  # of the delta
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scores: Scores | None = None  # where it was asked for


def edit(
    plan: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
    link: bool = False,
    evaluate: bool = False,
    **options: Any,
) -> Edited:
    """Carry out an edit plan and write what it changes to `out`, a delta file or a checkpoint.

    Options are fields of `Options`; `say` hears how far it is; `link` lets a checkpoint share by
    hard links those files of weights that are the base's as they were; `evaluate` asks about the
    edits before and after, as they will be stored. Raises `MergekitError` and leaves no
    `out` behind; the same plan gives the same bytes, so that a run that was stopped is run again.
    """
    chosen, to = Options(**options), Path(out)
    words, editor = read_edit(plan)
    _refuse_what_is_there(to, words.output, chosen)
    if link and words.output == "delta":
        raise PlanError("link has no effect: a patch holds what changed alone")
    edits = read_edits(words.edits)
    with quiet():
        source, tokenizer = around(words.base, offline=chosen.offline)
        edits = [*_extended(words, source), *edits]
        _require_one_target(edits)
        encoder = Encoder(tokenizer, words.template, eos=words.eos)
        made = _rewritten(editor, words, source, encoder, edits, chosen, say)
        asked = _asked(words, made, edits, chosen, say) if evaluate else None
    done = _write(source, made, to, words, edits, chosen, progress or Unwatched(), link)
    return replace(done, scores=asked)


def _rewritten(
    editor: Editor,
    words: EditPlan,
    source: Source,
    encoder: Encoder,
    edits: Sequence[Edit],
    chosen: Options,
    say: Callable[[str], None],
) -> Rewritten:
    """Let an editor that trains teach the edits, and one that solves write them."""
    device, seed = chosen.torch_device, words.seed
    if isinstance(editor, Teacher):
        budget = chosen.memory
        return teach(
            editor, source, encoder, edits, seed=seed, budget=budget, device=device, say=say
        )
    if not isinstance(editor, Solver):
        raise PlanError(f"{words.editor.method} is of no class of editors that is known here")
    base = open_base(words.base, partly=True, offline=chosen.offline)
    base.model.to(device)
    text = None if words.statistics is None else Path(words.statistics).expanduser()
    return solve(editor, base, encoder, edits, text=text, seed=seed, say=say)


def _asked(
    words: EditPlan,
    made: Rewritten,
    edits: Sequence[Edit],
    chosen: Options,
    say: Callable[[str], None],
) -> Scores:
    """Return what the model says of its edits before and after, in the dtypes that are stored."""
    base = open_base(words.base, partly=True, offline=chosen.offline)
    base.model.to(chosen.torch_device)
    speaker = ModelSpeaker(base.model, base.tokenizer, str(words.base))
    exam = Examination(edits, Encoder(base.tokenizer, words.template))
    say(f"{len(exam.questions)} questions are asked before and after")
    first = exam.ask(speaker)
    with torch.no_grad():
        for name, tensor in made.held.items():
            base.parameters[name].copy_(tensor)
    found = compared(exam, first, exam.ask(speaker, first))
    require_changed(found)
    told = found.report()
    made.facts["evaluation"] = {key: told[key] for key in ("asked", "before", "after")}
    return found


def _refuse_what_is_there(to: Path, output: str, options: Options) -> None:
    if (output == "delta") != (to.suffix == SUFFIX):
        wanted = f"a file that ends in {SUFFIX}" if output == "delta" else "a folder"
        raise WriteError(
            f"{to}: output {output} is {wanted}; name it so, or ask for the other (--output)"
        )
    if os.path.lexists(to) and not options.overwrite:
        raise WriteError(f"{to} exists; give --overwrite, or another name")


def _require_one_target(edits: Sequence[Edit]) -> None:
    """Refuse prompts that are to be answered in two ways; a model can say but one."""
    said: dict[str, Edit] = {}
    faults = []
    for made in edits:
        before = said.setdefault(made.prompt.strip(), made)
        if before.target.strip() != made.target.strip():
            faults.append(f"{made.where}: the prompt of {before.where}, with another target")
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise SourceError("\n".join(faults[:10]) + more)


def _extended(words: EditPlan, source: Source) -> list[Edit]:
    """Return the edits of the delta that is extended, which is of this base as it was."""
    if words.extend is None:
        return []
    path = Path(words.extend).expanduser()
    delta = open_delta(path, words.extend)
    rows = (delta.words.get("provenance") or {}).get("edits")
    if not isinstance(rows, list) or not rows:
        raise SourceError(f"{path}: holds no edits; only what `mergekit-ft edit` wrote is extended")
    for name, change in delta.changes.items():
        if name not in source or tensor_hash(source, name) != change.sha256:
            raise SourceError(
                f"{path}: is an edit of another base, by its tensor {name}; edits are taught anew "
                "from the original, so name that as the base"
            )
    return [edit_of(row, f"{path}: edit {i}") for i, row in enumerate(rows, start=1)]


def _write(
    source: Source,
    made: Rewritten,
    to: Path,
    words: EditPlan,
    edits: Sequence[Edit],
    chosen: Options,
    watcher: Progress,
    link: bool,
) -> Edited:
    """Write what changed: as a patch, or in the base's checkpoint."""
    facts = {"edits": len(edits), **made.facts}
    try:
        if words.output == "delta":
            delta = write_patch(source, made, to, words, edits, chosen, watcher)
            return Edited(to, delta.tensors, delta.nbytes, facts, [*made.notes, *delta.notes])
        result = write_checkpoint(source, made, to, words, edits, chosen, watcher, link=link)
    finally:
        watcher.close()
    notes = [*made.notes, *result.notes]
    return Edited(to, sorted(made.held), result.bytes_written, facts, notes)
