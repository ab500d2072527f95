"""The receipt beside the weights: what went in, what was asked, what came out."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ft import __version__
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.sides import RECEIPT

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution, Task
    from mergekit_ft.sources import Source

FORMAT = 1
Files = Mapping[str, Mapping[str, Any]]  # name -> {"size": bytes, "sha256": hexadecimal}
PARTS: dict[str, type] = {  # what a receipt must have for us to go by it
    "plan": str,
    "ids": list,
    "sources": list,
    "outputs": dict,
    "findings": dict,
    "options": dict,
}


def receipt(
    resolution: Resolution,
    outputs: Files,
    inputs: Mapping[str, Files],
    findings: Mapping[str, Any],
    options: Mapping[str, Any],
    changed: Mapping[str, bool],
) -> dict[str, Any]:
    """Return the receipt: no times and no places, so that the same merge has the same one."""
    plan = resolution.plan
    return {
        "format": FORMAT,
        "versions": _versions(),
        "method": plan.merge_method,
        "then": [step.method for step in plan.then],
        "plan": plan.text,
        "ids": list(resolution.ids),
        "options": dict(options),
        "seed": next((s for task in resolution.tasks if (s := _seed(task)) is not None), None),
        "sources": [_source(source, inputs) for source in resolution.leaves],
        "tokenizer": dict(resolution.donor.around.tokens) or None,
        "outputs": {name: dict(outputs[name]) for name in sorted(outputs)},
        "findings": dict(findings),
        "changed": {task.name: changed[task.name] for task in resolution.tasks},
        "unused": resolution.unused,
        "notes": list(resolution.notes),
    }


def read(folder: Path) -> dict[str, Any]:
    """Return the receipt in a folder."""
    path = folder / RECEIPT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{folder}: has no {RECEIPT}: is it the folder that `mergekit-ft merge` made?"
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    _check(found, path)
    return dict(found)


def _check(found: Any, path: Path) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise SourceError(f"{path}: is not a receipt of mergekit-ft")
    if found["format"] != FORMAT:
        raise SourceError(
            f"{path}: has format {found['format']}, and this version reads format {FORMAT}: use "
            "the version that wrote it"
        )
    if isinstance(found.get("kind"), str):
        raise SourceError(
            f"{path}: is the receipt of `mergekit-ft {found['kind']}`, which read its own files "
            "back; only merges of models by a plan are computed again"
        )
    broken = [key for key, kind in PARTS.items() if not isinstance(found.get(key), kind)]
    for i, source in enumerate(found.get("sources") or ()):
        if not isinstance(source, dict) or not {"reference", "revision", "files"} <= source.keys():
            broken.append(f"sources[{i}]")
    broken += [
        f"outputs: {name}"
        for name, file in (found.get("outputs") or {}).items()
        if not isinstance(file, dict) or not {"size", "sha256"} <= file.keys()
    ]
    if broken:
        raise SourceError(f"{path}: damaged at {', '.join(broken)}; restore it, or merge again")


def _source(source: Source, inputs: Mapping[str, Files]) -> dict[str, Any]:
    files = inputs.get(str(source), {})
    adapter = dict(zip(("reference", "revision"), source.adapter or (), strict=False))
    return {
        "reference": source.reference,
        "revision": source.revision,
        **({"adapter": adapter} if adapter else {}),
        "config": config_digest(source),
        "files": {name: dict(files[name]) for name in sorted(files)},
    }


def _seed(task: Task) -> int | None:
    """Return the key of a tensor's random masks, where its method draws any."""
    return getattr(task.operator, "seed", None)


def config_digest(source: Source) -> str | None:
    """Return the SHA-256 of a source's config.json; None without one."""
    path = source.folder / "config.json" if source.folder is not None else None
    if path is None or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    import torch

    return {
        "mergekit_ft": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
