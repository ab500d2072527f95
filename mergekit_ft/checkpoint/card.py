"""The model card of the output: what was merged, how, from what, and how to check it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_ft import registry
from mergekit_ft.checkpoint import licences
from mergekit_ft.sources.sides import PLAN, RECEIPT

if TYPE_CHECKING:
    from mergekit_ft.resolution import Resolution
    from mergekit_ft.sources import Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*")
WEIGHTS = ".safetensors"


def card(resolution: Resolution, receipt: Mapping[str, Any]) -> str:
    """Return the README.md of the output; the receipt may lack the card itself."""
    plan = resolution.plan
    parts = [
        front(resolution, "merge"),
        f"# {plan.name or _title(resolution)}",
        f"A merge of open models, made with mergekit-ft by `{plan.merge_method}`.",
        f"- **Method** `{plan.merge_method}`: {registry.summary(plan.merge_method)}",
        *(f"- **Then** `{s.method}`: {registry.summary(s.method)}" for s in plan.then),
        models(resolution),
        f"## Plan\n\n{fenced(plan.text.strip(), 'yaml')}\n\n`{PLAN}` holds the same text.",
        *_section("Notes", receipt["notes"]),
        receipt_of(receipt),
        f"## Verify\n\n`{RECEIPT}` has the SHA-256 of every file that went in and came out. This "
        f"hashes them again and recomputes a sample of the tensors:\n\n"
        f"{fenced('mergekit-ft verify .', 'bash')}",
    ]
    return joined(parts)


def joined(parts: list[str]) -> str:
    """Join paragraphs; items of one list stand close."""
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text)


def _section(title: str, items: Iterable[str]) -> Iterator[str]:
    """Yield a list under a title, where it holds something."""
    listed = [f"- {_plain(item)}" for item in items]
    if listed:
        yield "\n".join([f"## {title}\n", *listed])


def _plain(text: str) -> str:
    """Return text that Markdown leaves as it is, on one line."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(text.split()))


def _title(resolution: Resolution) -> str:
    """Return what the merge is: no place where it lies, so that a copy's card is the same."""
    names = [PurePath(source.reference).name for source in resolution.members]
    return f"{resolution.plan.merge_method} merge of {' + '.join(dict.fromkeys(names))}"


def front(resolution: Resolution, relation: str) -> str:
    """Return what the hub reads of a card; `relation` is the output's to its base models."""
    words = yaml.safe_dump(_front(resolution, relation), sort_keys=False, allow_unicode=True)
    return f"---\n{words}---"


def _front(resolution: Resolution, relation: str) -> dict[str, Any]:
    named = [model for source in resolution.leaves for model in _on_hub(source)]
    front = dict(licences.agreed(resolution))
    if named:
        front |= {"base_model": list(dict.fromkeys(named)), "base_model_relation": relation}
    if resolution.donor.config:
        front["library_name"] = "transformers"
    return front | {"tags": [relation, "mergekit-ft"]}


def _on_hub(source: Source) -> Iterator[str]:
    """Yield the repos that a source was made of: a model's, and its adapter's."""
    for part in source.reference.split("+"):
        name = part.partition("@")[0]
        if HUB_ID.fullmatch(name) and not os.path.exists(name):
            yield name


def models(resolution: Resolution) -> str:
    """Return the models that were read, with their licences."""
    lines = ["## Models\n"]
    for source in resolution.leaves:
        role = " (base)" if source is resolution.base else ""
        lines.append(f"- `{source}`{role}: licence {_plain(str(licences.of(source)))}")
    if resolution.plan.stored_dtype:
        lines.append(f"\nWeights are stored as {resolution.plan.stored_dtype}.")
    return "\n".join(lines)


def receipt_of(receipt: Mapping[str, Any]) -> str:
    """Return what the receipt says, for people."""
    changed = receipt["changed"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    lines = [
        "## Receipt\n",
        f"- Changed {sum(changed.values()):,} of {len(changed):,} tensors.",
        f"- Versions: {_plain(versions)}.",
    ]
    if receipt["seed"] is not None:
        lines.append(f"- Seed of the random masks: {receipt['seed']}.")
    lines += ["", "| file | bytes | SHA-256 |", "| --- | ---: | --- |"]
    lines += [
        f"| `{name}` | {file['size']:,} | `{file['sha256']}` |"
        for name, file in receipt["outputs"].items()
        if name.endswith(WEIGHTS)
    ]
    return "\n".join(lines)


def fenced(text: str, language: str) -> str:
    """Return text in a fence that is longer than any within it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
