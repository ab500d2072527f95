"""The model card of the output: what was merged, how, and how to check it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_ft import registry
from mergekit_ft.sources.sides import RECEIPT

if TYPE_CHECKING:
    from mergekit_ft.plan import ModelReference
    from mergekit_ft.resolution import Resolution
    from mergekit_ft.sources import Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*")
FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
LICENCE = ("license", "license_name", "license_link")
LONGEST = 1 << 20  # bytes of a card that are read


def card(resolution: Resolution, name: str) -> str:
    """Return the README.md of the output."""
    plan = resolution.plan
    front = yaml.safe_dump(_front(resolution), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {plan.name or name}",
        f"A merge of open models, made with mergekit-ft by `{plan.merge_method}`.",
        f"- **Method** `{plan.merge_method}`: {registry.summary(plan.merge_method)}",
        *(f"- **Then** `{s.method}`: {registry.summary(s.method)}" for s in plan.then),
        _models(resolution),
        f"## Plan\n\n{_fenced(plan.text, 'yaml')}",
        f"## Verify\n\n`{RECEIPT}` has the SHA-256 of every file that went in and came out. This "
        f"hashes them again and recomputes a sample of the tensors:\n\n"
        f"{_fenced('mergekit-ft verify .', 'bash')}",
    ]
    return _joined(parts)


def licence(source: Source) -> dict[str, Any]:
    """Return what the front matter of a model's card says of its licence."""
    front = _front_matter(source.folder / "README.md") if source.folder else {}
    return {key: front[key] for key in LICENCE if key in front}


def _joined(parts: list[str]) -> str:
    """Join paragraphs; items of one list stand close."""
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text)


def _front(resolution: Resolution) -> dict[str, Any]:
    named = [model.path for model in _named(resolution) if _on_hub(model)]
    front: dict[str, Any] = dict(licence(resolution.donor))
    if named:
        front |= {"base_model": list(dict.fromkeys(named)), "base_model_relation": "merge"}
    return front | {"library_name": "transformers", "tags": ["merge", "mergekit-ft"]}


def _named(resolution: Resolution) -> list[ModelReference]:
    plan = resolution.plan
    base = [plan.base_model] if plan.base_model is not None else []
    return [*base, *(entry.model for entry in plan.models)]


def _on_hub(model: ModelReference) -> bool:
    return model.local is None and HUB_ID.fullmatch(model.path) is not None


def _models(resolution: Resolution) -> str:
    base = resolution.plan.base_model
    lines = ["## Models\n"]
    for model in dict.fromkeys(map(str, _named(resolution))):
        role = " (base)" if base is not None and model == str(base) else ""
        lines.append(f"- `{model}`{role}")
    if resolution.plan.stored_dtype:
        lines.append(f"\nWeights are stored as {resolution.plan.stored_dtype}.")
    return "\n".join(lines)


def _fenced(text: str, language: str) -> str:
    """Return text in a fence that is longer than any within it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML front matter of a card; {} where there is none to be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            match = FRONT.match(file.read(LONGEST))
        front = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
