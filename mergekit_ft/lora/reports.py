"""What is told of an adapter: as JSON, as lines, and as the card beside its weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_ft.checkpoint.card import HUB_ID
from mergekit_ft.inspection.tables import count, size, table

Report = dict[str, Any]
ROWS = 400  # of the table of a card


def totals(matrices: Sequence[Mapping[str, Any]], energies: Sequence[float]) -> Report:
    """Return ranks, parameters and energy over all matrices; `energies` are those of the deltas."""
    total = math.fsum(energies)
    kept = math.fsum(m["energy"] * e for m, e in zip(matrices, energies, strict=True))
    ranks = [matrix["rank"] for matrix in matrices]
    share = kept / total if total else 1.0
    return {
        "matrices": len(matrices),
        "ranks": [min(ranks), max(ranks)],
        "parameters": sum(matrix["parameters"] for matrix in matrices),
        "energy": share,
        "residual": math.sqrt(max(0.0, 1.0 - share)),
    }


def matrix_lines(matrices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of the matrices."""
    rows = [[m["module"], *_cells(m)] for m in matrices]
    return table(("module", "shape", "rank", "energy kept", "residual", "svd"), rows)


def total_line(found: Mapping[str, Any]) -> str:
    """Return what all matrices have in common."""
    least, most = found["ranks"]
    rank = f"rank {least}" if least == most else f"ranks {least} to {most}"
    matrices = f"{found['matrices']:,} {'matrix' if found['matrices'] == 1 else 'matrices'}"
    return (
        f"{matrices}, {rank}, {count(found['parameters'], 'parameter')}; energy "
        f"kept {found['energy']:.6f}, relative residual {found['residual']:.3g}"
    )


def lines(report: Report, *, layers: bool = True) -> Iterator[str]:
    """Yield a report as text."""
    if layers:
        yield from matrix_lines(report["matrices"])
    yield from (f"  {glob}: {count(hits, 'tensor')}" for glob, hits in report["selectors"].items())
    yield total_line(report["totals"])
    yield from (f"note: {note}" for note in report["notes"])
    yield f"{report['out']}: {size(report['bytes'])}, read back and compared"


def extraction_card(report: Report) -> str:
    """Return the card of an extracted adapter."""
    found = report["totals"]
    asked = " ".join(report["asked"])
    parts = [
        _front(report["base"]),
        f"# LoRA of {_name(report['tuned'])} on {_name(report['base'])}",
        f"The difference of two checkpoints as an adapter of low rank, made with `mergekit-ft "
        f"lora extract` ({asked}). For each matrix B @ A is the nearest of its rank to tuned - "
        "base; its scale is 1.",
        f"- **Base** `{report['base']}`\n- **Tuned** `{report['tuned']}`\n- {total_line(found)}",
        *_notes(report),
        _use(report),
        _matrices(report),
    ]
    return "\n\n".join(parts) + "\n"


def merge_card(report: Report) -> str:
    """Return the card of merged adapters."""
    listed = "\n".join(f"- `{a['reference']}` x {a['weight']:g}" for a in report["adapters"])
    parts = [
        _front(report["base"]),
        f"# LoRA merge of {' + '.join(_name(a['reference']) for a in report['adapters'])}",
        f"Adapters merged in the space of their deltas (scale * B @ A), made with `mergekit-ft "
        f"lora merge` ({' '.join(report['asked'])}). The scale of the result is 1.",
        listed,
        f"- {total_line(report['totals'])}",
        *_notes(report),
        _use(report),
        _matrices(report),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(m: Mapping[str, Any]) -> list[str]:
    shape = f"{m['shape'][0]} x {m['shape'][1]}"
    how = m["svd"] if not m.get("iterations") else f"{m['svd']} ({m['iterations']})"
    return [shape, str(m["rank"]), f"{m['energy']:.6f}", f"{m['residual']:.3g}", how]


def _front(base: str | None) -> str:
    on_hub = base is not None and HUB_ID.fullmatch(base) and not os.path.exists(base)
    named = f"base_model: {base}\n" if on_hub else ""
    return f"---\n{named}library_name: peft\ntags:\n- lora\n- mergekit-ft\n---"


def _name(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[2]


def _notes(report: Report) -> Iterator[str]:
    if report["notes"]:
        yield "## Notes\n\n" + "\n".join(f"- {note}" for note in report["notes"])


def _use(report: Report) -> str:
    base = report["base"] or "BASE"
    rows = report.get("rows")
    resized = f"base.resize_token_embeddings({rows})\n" if rows else ""
    return (
        "## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import "
        f'AutoModelForCausalLM\n\nbase = AutoModelForCausalLM.from_pretrained("{base}")\n{resized}'
        'model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")\n```'
    )


def _matrices(report: Report) -> str:
    found = report["matrices"]
    head = "| module | shape | rank | energy kept | relative residual | svd |\n"
    rows = [f"| `{m['module']}` | {' | '.join(_cells(m))} |" for m in found[:ROWS]]
    more = [f"\n{len(found) - ROWS} more are in the lock file."] if len(found) > ROWS else []
    return f"## Matrices\n\n{head}| --- | --- | ---: | ---: | ---: | --- |\n" + "\n".join(
        [*rows, *more]
    )
