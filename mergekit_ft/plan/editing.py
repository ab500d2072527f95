"""What an edit plan may say, key by key, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PrivateAttr

from mergekit_ft.errors import PlanError
from mergekit_ft.plan.methods import Method, MethodsReading, built, made, words_of
from mergekit_ft.plan.references import ModelReference, PlanWords
from mergekit_ft.plan.tuning import Files

if TYPE_CHECKING:
    from mergekit_ft.rewriting import Editor


class EditPlan(PlanWords):
    """What is asked of an editing."""

    base: ModelReference
    edits: Files  # JSONL or JSON
    editor: Method
    output: Literal["delta", "checkpoint"] = "delta"
    template: Literal["raw", "chat"] = "raw"  # how the model will be asked
    eos: bool = True  # whether a target ends with the token that ends a text
    statistics: str | None = None  # a text, where an editor needs to know what models meet in text
    extend: str | None = None  # an edit's delta, whose edits are taught again, before these
    seed: int = 0

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """Return the plan as it was written."""
        return self._text


_EXAMPLES = {
    "base": "the model to edit: `base: ./model`",
    "edits": "what to write into it: `edits: edits.jsonl`",
    "editor": "how: `editor: locft_bf` or another of `mergekit-ft methods`",
}


def read_edit(plan: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[EditPlan, Editor]:
    """Return an edit plan given as a file, as YAML text, or as a mapping, and its editor.

    PlanError holds every fault found.
    """
    reading = words_of(plan)
    found: EditPlan | None = None
    editor: Editor | None = None
    if reading.words is not None:
        found = built(EditPlan, reading, _EXAMPLES)
        editor = made(reading, "editor")
    if found is not None and found.template == "chat" and not found.eos:
        message = "eos has no effect in a chat: its template ends the turn"
        reading.add(("eos",), message, key=True)
    if found is not None and editor is not None:
        _check_statistics(found, editor, reading)
    if found is None or editor is None or reading.faults:
        raise PlanError(reading.faults or "the plan holds nothing that can be used")
    found._text = reading.text
    return found, editor


def _check_statistics(plan: EditPlan, editor: Editor, reading: MethodsReading) -> None:
    """Add that an editor lacks the text that it needs, or has one that it does not look at."""
    name, given = plan.editor.method, plan.statistics is not None
    if editor.wants_statistics and not given:
        message = "needs statistics of what the model meets in text: `statistics: FILE`, plain text"
        reading.add(("editor",), f'{name} {message} or JSONL rows {{"text": ...}}')
    if given and not editor.wants_statistics:
        message = f"statistics has no effect: {name}, as it is set, looks at no text"
        reading.add(("statistics",), message, key=True)
