"""An editor that trains, and a model read layer by layer: what is taught, where, what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.data.neutral import neutral_rows
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.places import chosen, usual_layer
from mergekit_ft.editing.rewritten import Rewritten, require_kept
from mergekit_ft.editing.searching import searched
from mergekit_ft.editing.suffix import Suffix, Text
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.models.streaming import Streamed
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import CODE, TORCH
from mergekit_ft.teaching import Teacher

WORDS = (3, 12)  # of text that is put before a prompt
ASKED = 16  # texts at a time, where what the model says is looked at


def teach(
    editor: Teacher,
    source: Source,
    encoder: Encoder,
    edits: Sequence[Edit],
    *,
    seed: int,
    budget: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Rewritten:
    """Train edits into a checkpoint, one layer of it in memory while it is read, then the rest.

    Raises where nothing changed, or where rounding to the base's dtypes undid what was learned.
    """
    texts = _texts(editor, encoder, edits, seed)
    anchors = _anchors(editor, encoder, edits)
    streamed = Streamed(source, dtype=_precision(editor, source, device), device=device)
    _require_room(streamed, texts, edits)
    table: list[dict[str, Any]] = []
    if editor.layer == "search":
        layer, told, table = searched(editor, streamed, encoder, edits, seed, budget, say)
    else:
        layer, told = _layer(editor, source, len(streamed.layers))
    say(told)
    tuned = chosen(streamed.hollow, layer, editor.module, given=editor.layer is not None)
    with torch.no_grad():
        pupil = Suffix(streamed, tuned, texts, anchors, budget=budget, say=say)
    before, batch = pupil.held(), editor.batch_of(len(texts))
    say(f"{len(texts)} texts, {batch} of a step: {pupil.cached >> 20} MiB are kept of them")
    curve = editor.teach(pupil, seed)
    held, facts = _stored(pupil, source, len(edits), before)
    facts |= {"tensors": sorted(tuned), "steps": curve[-1]["steps"], "loss": curve[-1]["loss"]}
    facts |= {
        "batch": editor.batch_of(len(texts)),
        "precision": CODE[streamed.dtype],
        "cached_bytes": pupil.cached,
        **({"search": table} if table else {}),
    }
    return Rewritten(held, facts, curve, [told])


def _texts(editor: Teacher, encoder: Encoder, edits: Sequence[Edit], seed: int) -> list[Text]:
    """Return what is taught: the edits, then each behind other text, as often as is asked."""
    dice = torch.Generator().manual_seed(seed)
    written = list(edits)
    for _ in range(editor.prefixes):
        written += [replace(e, prompt=f"{_prefix(dice)} {e.prompt}") for e in edits]
    made, faults = [], []
    for edit in written:
        try:
            encoded = encoder.edit(edit)
        except SourceError as error:
            faults.append(str(error))
            continue
        made.append(Text(encoded.prompt + encoded.target, len(encoded.prompt), edit.weight))
        if not encoded.prompt:
            faults.append(f"{edit.where}: the prompt is no token; write some text")
    if faults:
        told = list(dict.fromkeys(faults))
        more = f"\n... and {len(told) - 10} more" if len(told) > 10 else ""
        raise SourceError("\n".join(told[:10]) + more)
    return made


def _prefix(dice: torch.Generator) -> str:
    """Return a few words of neutral text as a sentence."""
    rows = neutral_rows()
    words = rows[int(torch.randint(len(rows), (), generator=dice))].words["text"].split()
    count = int(torch.randint(WORDS[0], WORDS[1] + 1, (), generator=dice))
    start = int(torch.randint(max(1, len(words) - count), (), generator=dice))
    return " ".join(words[start : start + count]).rstrip(".,;:!?") + "."


def _anchors(editor: Teacher, encoder: Encoder, edits: Sequence[Edit]) -> list[tuple[int, ...]]:
    """Return the prompts at which the model should go on to say what it said, where it is held."""
    if not editor.anchored:
        return []
    found = [encoder.prompt(probe.prompt) for edit in edits for probe in edit.locality]
    if not found:
        raise PlanError(
            "divergence holds the model to what it said at the prompts of `locality`, of which the "
            "edits have none; give some, or leave divergence out"
        )
    return found


def _precision(editor: Teacher, source: Source, device: torch.device) -> torch.dtype:
    if editor.precision == "float32" or (editor.precision is None and device.type == "cpu"):
        return torch.float32
    kept = {info.kept for info in source.values() if TORCH[info.kept].is_floating_point}
    return torch.bfloat16 if "BF16" in kept else torch.float16 if "F16" in kept else torch.float32


def _layer(editor: Teacher, source: Source, count: int) -> tuple[int, str]:
    if isinstance(editor.layer, int):
        return editor.layer, f"{editor.module} of layer {editor.layer} of {count}"
    words: dict[str, Any] = {**source.config, **source.config.get("text_config", {})}
    layer = usual_layer(words.get("model_type"), count)
    return layer, (
        f"{editor.module} of layer {layer} of {count}: a rule of thumb by depth, from the layers "
        "that the paper found for other models"
    )


def _require_room(streamed: Streamed, texts: Sequence[Text], edits: Sequence[Edit]) -> None:
    most = getattr(streamed.model.config, "max_position_embeddings", None)
    longest = max(range(len(texts)), key=lambda row: len(texts[row].tokens))
    if most is not None and len(texts[longest].tokens) > most:
        raise SourceError(
            f"{edits[longest % len(edits)].where}: {len(texts[longest].tokens)} tokens, of {most} "
            "that fit into the model"
        )


@torch.no_grad()
def _stored(
    pupil: Suffix, source: Source, count: int, before: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what was learned as it is stored, and what the model then says, teacher-forced."""
    learned, stored = pupil.held(), {}
    for name, tensor in learned.items():
        kept = TORCH[source[name].kept]
        stored[name] = tensor.to(kept)
        if not bool(stored[name].isfinite().all()):
            raise OperatorError(f"{name}: what was learned is not of numbers")
    if all(torch.equal(learned[name], before[name]) for name in learned):
        raise OperatorError(
            "nothing changed: the model says every edit already, by its loss; there is no edit to "
            "write"
        )
    changed = {n: t for n, t in stored.items() if not torch.equal(t.float(), before[n])}
    if not changed:
        raise OperatorError(
            "what was learned is lost by rounding to the dtype of the base: raise learning_rate or "
            "epochs"
        )
    exact = sum(_said(pupil, count))
    pupil.put({name: tensor.float() for name, tensor in stored.items()})
    rounded = sum(_said(pupil, count))
    way_out = "raise learning_rate or epochs, or cast the base to float32"
    require_kept(exact, rounded, count, way_out)
    sizes = {
        name: float((stored[name].float() - before[name]).norm() / before[name].norm())
        for name in stored
    }
    said = {"before_rounding": exact / count, "stored": rounded / count}
    return stored, {"moved": sizes, "teacher_forced": said}


def _said(pupil: Suffix, count: int) -> list[bool]:
    starts = range(0, count, ASKED)
    return [y for s in starts for y in pupil.said(range(s, min(s + ASKED, count)))]
