"""lm-evaluation-harness (EleutherAI), where it is installed: its tasks, asked of our models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mergekit_ft.errors import OperatorError, PlanError
from mergekit_ft.evaluation.measures import Figure
from mergekit_ft.models.speaker import ModelSpeaker, Speaker

NAME = "lm_eval"


def require_harness() -> None:
    """Refuse, before there is work, to ask what is not there."""
    if find_spec(NAME) is None:
        raise PlanError(
            "tasks of the harness need lm-evaluation-harness, which is not installed: "
            "pip install 'lm_eval[hf]'"
        )


def ask_harness(
    speaker: Speaker, name: str, tasks: Sequence[str], limit: int | None, batch: int
) -> dict[str, dict[str, Figure]]:
    """Return the figures that the harness finds of each task, by its own names for them."""
    if not isinstance(speaker, ModelSpeaker):
        raise PlanError(f"{name}: is not one transformers model, which is what the harness asks")
    try:
        wrapped = import_module(f"{NAME}.models.huggingface").HFLM(
            pretrained=speaker.model, tokenizer=speaker.tokenizer, batch_size=batch
        )
        found = import_module(NAME).simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, log_samples=False
        )
    except Exception as error:  # whatever it raises, it is the harness's to say
        raise OperatorError(f"{name}: lm-evaluation-harness: {error}") from error
    return {task: _figures(words) for task, words in found["results"].items()}


def _figures(words: Mapping[str, Any]) -> dict[str, Figure]:
    """Read "acc,none" and "acc_stderr,none" as a figure."""
    found: dict[str, Figure] = {}
    for key, value in words.items():
        measure, comma, filtered = key.partition(",")
        if not comma or measure.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = words.get(f"{measure}_stderr,{filtered}")
        label = measure if filtered == "none" else f"{measure} ({filtered})"
        known = isinstance(stderr, int | float)
        found[label] = Figure(float(value), float(stderr) if known else None)  # type: ignore[arg-type]
    return found
