"""An editor that solves, and a model in memory: contexts, statistics, the edits, what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.algebra.associations import ENOUGH
from mergekit_ft.editing.contexts import contexts
from mergekit_ft.editing.corpus import open_corpus
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.matrices import Matrix, matrices, require
from mergekit_ft.editing.memory import Fact, ModelMemory, fact, keys_of
from mergekit_ft.editing.moments import Library, Statistics
from mergekit_ft.editing.rewritten import Rewritten, require_kept
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.evaluation.scoring import scored
from mergekit_ft.models.layered import Layered
from mergekit_ft.models.opening import Base
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.recalling import Solver
from mergekit_ft.sources.dtypes import TORCH

ASKED = 16  # texts at a time, where what the model says is looked at


def solve(
    editor: Solver,
    base: Base,
    encoder: Encoder,
    edits: Sequence[Edit],
    *,
    text: Path | None,
    seed: int,
    say: Callable[[str], None],
) -> Rewritten:
    """Write edits into a model in memory, by closed forms; `text` is what statistics are of.

    Raises all that is wrong with edits, layers and text before a value is sought, and where
    rounding to the base's dtypes undid what was written.
    """
    layered = Layered(base)
    chosen = _matrices(editor, base, layered)
    speaker = ModelSpeaker(layered.model, base.tokenizer, base.source.reference)
    before = contexts(speaker, editor.contexts, seed)
    facts = _facts(encoder, speaker, edits, before)
    notes: list[str] = []
    known = _statistics(editor, base, layered, chosen, text, speaker.most, say, notes)
    seconds = {layer: of.second for layer, of in known.items()}
    memory = ModelMemory(layered, chosen, facts, seconds, say, base.padding)
    editor.solve(memory)
    held, told = _stored(base, chosen, speaker, encoder, edits)
    told |= {
        "layers": list(chosen),
        "contexts": before[1:],
        "statistics": {str(layer): of.told() for layer, of in known.items()},
        "value_losses": memory.losses,
    }
    return Rewritten(held, told, notes=notes)


def _matrices(editor: Solver, base: Base, layered: Layered) -> dict[int, Matrix]:
    """Return the matrices of the layers that are written."""
    count = len(layered.layers)
    layers = editor.written(count)
    if any(not 0 <= layer < count for layer in layers):
        raise PlanError(f"layers {list(layers)}: this model has layers 0 to {count - 1}")
    found = matrices(base, layered)
    return {layer: require(base, layered, layer, found) for layer in layers}


def _facts(
    encoder: Encoder, speaker: ModelSpeaker, edits: Sequence[Edit], before: Sequence[str]
) -> list[Fact]:
    """Return the edits in their contexts, or raise what is wrong with all of them."""
    facts: list[Fact] = []
    faults: list[str] = []
    for edit in edits:
        try:
            made = fact(encoder, edit, before)
        except SourceError as error:
            faults.append(str(error))
            continue
        longest = max(len(tokens) for tokens, _ in made.texts) + len(made.target)
        if speaker.most is not None and longest > speaker.most:
            faults.append(f"{edit.where}: {longest} tokens, behind a context, of {speaker.most}")
        facts.append(made)
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise SourceError("\n".join(faults[:10]) + more)
    return facts


def _statistics(
    editor: Solver,
    base: Base,
    layered: Layered,
    chosen: Mapping[int, Matrix],
    text: Path | None,
    most: int | None,
    say: Callable[[str], None],
    notes: list[str],
) -> dict[int, Statistics]:
    """Return the statistics of the layers that are written, remembered or gathered."""
    if not editor.wants_statistics:
        return {}
    if text is None:
        least = ENOUGH * max(matrix.width for matrix in chosen.values())
        raise PlanError(
            "a text is needed, for statistics of what the model's MLPs meet: plain text or JSONL "
            f'rows {{"text": ...}}, of at least {least:,} tokens'
        )
    corpus = open_corpus(text, base.tokenizer, most)
    names = {layer: matrix.name for layer, matrix in chosen.items()}
    keys = keys_of(layered, chosen, base.padding)
    library = Library(base.source, base.places, corpus, keys, names, say, notes)
    return library.of(chosen)


@torch.no_grad()
def _stored(
    base: Base,
    chosen: Mapping[int, Matrix],
    speaker: ModelSpeaker,
    encoder: Encoder,
    edits: Sequence[Edit],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what was written as it is stored, and what the model then says, teacher-forced."""
    exact = _said(speaker, encoder, edits)
    held: dict[str, Tensor] = {}
    moved: dict[str, float] = {}
    for matrix in chosen.values():
        kept = matrix.weight.to("cpu", TORCH[base.source[matrix.name].kept])
        before = base.origin(matrix.name)
        moved[matrix.name] = float((kept.float() - before).norm() / before.norm())
        matrix.weight.copy_(kept)
        held[matrix.name] = kept
    if not any(moved.values()):
        raise OperatorError(
            "what was written is lost by rounding to the dtype of the base; cast it to float32"
        )
    rounded = _said(speaker, encoder, edits)
    require_kept(exact, rounded, len(edits), "cast the base to float32")
    said = {"before_rounding": exact / len(edits), "stored": rounded / len(edits)}
    return held, {"moved": moved, "teacher_forced": said}


def _said(speaker: ModelSpeaker, encoder: Encoder, edits: Sequence[Edit]) -> int:
    """Return of how many edits every token of the target is the likeliest."""
    found = scored(speaker, [encoder.edit(edit).sample for edit in edits], ASKED)
    return sum(made.right == made.tokens for made in found)
