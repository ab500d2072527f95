"""What comes out of an editing: a patch, or the base's checkpoint with what changed in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ft import registry
from mergekit_ft.checkpoint import card
from mergekit_ft.deltas.extract import Asked, Extracted, between
from mergekit_ft.deltas.pairs import Choice
from mergekit_ft.editing.facts import Edit, words_of
from mergekit_ft.editing.rewritten import Rewritten
from mergekit_ft.engine import Result, Story
from mergekit_ft.options import Options, Progress
from mergekit_ft.plan.editing import EditPlan
from mergekit_ft.resolution import Resolution
from mergekit_ft.sources import Source
from mergekit_ft.tuning.outputs import in_memory, write_full

PLAN, EDITS = "mergekit_ft.edit.yaml", "mergekit_ft.edits.jsonl"  # beside a checkpoint
SHOWN = 10  # edits that a card shows


@dataclass(frozen=True)
class EditStory(Story):
    """That the weights were edited: the plan, the edits, what was measured."""

    plan: EditPlan
    edits: Sequence[Edit]
    facts: Mapping[str, Any]
    what = "writing"

    def files(self, resolution: Resolution) -> Mapping[str, bytes]:
        """Return the plan and the edits."""
        rows = (json.dumps(words_of(made), ensure_ascii=False) + "\n" for made in self.edits)
        return {PLAN: self.plan.text.encode(), EDITS: "".join(rows).encode()}

    def receipt(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """Return the receipt: an editing is told, for it is not computed again."""
        told = {"plan": self.plan.text, "method": self.plan.editor.method, "then": []}
        return {**receipt, **told, "editing": {"edits": len(self.edits), **self.facts}}

    def card(self, resolution: Resolution, receipt: Mapping[str, Any]) -> str:
        """Return the README.md."""
        method = self.plan.editor.method
        shown = [f"- {made.prompt!r}: {made.target!r}" for made in self.edits[:SHOWN]]
        if len(self.edits) > SHOWN:
            shown.append(f"- and {len(self.edits) - SHOWN} more, in `{EDITS}`")
        moved = [f"- `{n}` moved by {m:.2%} of its norm" for n, m in self.facts["moved"].items()]
        return card.joined(
            [
                card.front(resolution, "finetune"),
                f"# {Path(self.plan.base.path).name}, edited",
                f"A model with {len(self.edits)} facts edited into it with mergekit-ft.",
                f"- **Editor** `{method}`: {registry.summary(method)}",
                card.models(resolution),
                "## Edits\n\n" + "\n".join(shown),
                "## What changed\n\n" + "\n".join(moved),
                f"## Plan\n\n{card.fenced(self.plan.text.strip(), 'yaml')}\n\n`{PLAN}` holds the "
                "same text.",
                card.receipt_of(receipt),
            ]
        )


def write_patch(
    source: Source,
    made: Rewritten,
    to: Path,
    plan: EditPlan,
    edits: Sequence[Edit],
    options: Options,
    watcher: Progress,
) -> Extracted:
    """Write what changed, with the edits, so that they can be taught again."""
    curve = [{k: v for k, v in entry.items() if k != "batches"} for entry in made.curve]
    told = {
        "method": plan.editor.method,
        "parameters": dict(plan.editor.parameters),
        "seed": plan.seed,
        "provenance": {
            "plan": plan.text,
            "edits": [words_of(one) for one in edits],
            "facts": made.facts,
            "curve": curve,
        },
    }
    with in_memory(source, made.held) as edited:
        return between(source, edited, to, Asked(), Choice(), options, watcher, told)


def write_checkpoint(
    source: Source,
    made: Rewritten,
    to: Path,
    plan: EditPlan,
    edits: Sequence[Edit],
    options: Options,
    watcher: Progress,
    *,
    link: bool,
) -> Result:
    """Write the base's checkpoint with what changed in it.

    `link` lets files of weights that came out as the base has them be the base's own, by hard
    links, so that the disk holds them once.
    """
    story = EditStory(plan, edits, made.facts)
    result = write_full(plan.base, made.held, to, story, options, watcher)
    if link:
        _link(source, to, result.receipt)
    return result


def _link(source: Source, out: Path, receipt: Mapping[str, Any]) -> None:
    """Put hard links to the base's files where the receipt says that the bytes are the same."""
    known = {
        name: told["sha256"] for one in receipt["sources"] for name, told in one["files"].items()
    }
    for file in source.files:
        made = receipt["outputs"].get(file.name)
        if made is None or made["sha256"] != known.get(file.name):
            continue
        place, part = out / file.name, out / f"{file.name}.link"
        try:
            os.link(file.path.resolve(), part)
        except OSError:  # another disk, or one without links: the copy stays
            continue
        os.replace(part, place)
