"""What editing by the layers above costs: CPU time of an epoch against the whole model's; memory.

    python benchmarks/editing.py BASE EDITS [--layer 22] [--count 100] [--batch 10]

BASE is a checkpoint, EDITS a file of edits. Both loops take the same batches in float32 on one
thread, one epoch after the other in turns; the whole model's trains the same matrix, its other
weights are frozen. Memory is anonymous, at its peak, beyond the interpreter with torch (Linux
only), of `mergekit-ft edit` as a user runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _anonymous
import torch

from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import read_edits, words_of
from mergekit_ft.editing.places import chosen
from mergekit_ft.editing.suffix import Suffix, Text
from mergekit_ft.methods.locft_bf import LocftBf
from mergekit_ft.models.opening import around, open_base, quiet
from mergekit_ft.models.streaming import Streamed
from mergekit_ft.resolution.opening import reference_of

KNOWN = """
import mergekit_ft.editing.run
from mergekit_ft.models.opening import around
from mergekit_ft.models.streaming import Streamed
from mergekit_ft.resolution.opening import reference_of
source, tokenizer = around(reference_of("{base}"))
streamed = Streamed(source)
"""
BAR = 2.5  # times less CPU an epoch
TURNS = 3
Made = tuple[Suffix, Any, torch.nn.Parameter]


def main() -> None:
    """Print CPU seconds an epoch of both loops, their ratio, and the peak of a run."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("base")
    asked.add_argument("edits", type=Path)
    asked.add_argument("--layer", type=int, default=22)
    asked.add_argument("--count", type=int, default=100)
    asked.add_argument("--batch", type=int, default=10)
    given = asked.parse_args()
    torch.set_num_threads(1)
    edits = read_edits([given.edits])[: given.count]
    how = LocftBf(batch=given.batch, epochs=1, learning_rate=2e-3)
    with quiet():
        suffix, model, weight = _both(given, edits)
    times: dict[str, list[float]] = {"suffix": [], "whole": []}
    for turn in range(TURNS):
        start = time.process_time()
        how.teach(suffix, turn)
        times["suffix"].append(time.process_time() - start)
        start = time.process_time()
        _epoch(model, weight, suffix.texts, given.batch)
        times["whole"].append(time.process_time() - start)
    ours, theirs = (sorted(times[name])[TURNS // 2] for name in ("suffix", "whole"))
    print(f"an epoch of {len(edits)} edits at layer {given.layer}: {ours:.1f} CPU-s by the layers")
    print(f"above, {theirs:.1f} by the whole model: {theirs / ours:.2f} x (bar {BAR})")
    resident = sum(t.numel() * t.element_size() for _, t in suffix.streamed.hollow.resident())
    masters = 16 * sum(master.numel() for master in suffix.masters)
    _memory(given, edits, (resident, masters, suffix.cached))


def _both(given: Any, edits: Any) -> Made:
    """Return what is above the layer, and the whole model with the same matrix to train."""
    reference = reference_of(given.base)
    source, tokenizer = around(reference)
    encoder = Encoder(tokenizer)
    encoded = [encoder.edit(edit) for edit in edits]
    texts = [Text(one.prompt + one.target, len(one.prompt)) for one in encoded]
    streamed = Streamed(source)
    tuned = chosen(streamed.hollow, given.layer, "down_proj", given=True)
    start = time.process_time()
    suffix = Suffix(streamed, tuned, texts)
    print(f"the caching pass: {time.process_time() - start:.1f} CPU-s, {suffix.cached >> 20} MiB")
    base = open_base(reference)
    base.model.requires_grad_(False)
    weight = base.parameters[next(iter(tuned))].requires_grad_(True)
    return suffix, base.model, weight


def _epoch(model: Any, weight: torch.nn.Parameter, texts: list[Text], batch: int) -> None:
    """Train on each text once by the whole model, as a loop that knows nothing of layers does."""
    adam = torch.optim.Adam([weight], lr=2e-3)
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        length = max(len(text.tokens) for text in some)
        tokens = torch.zeros(len(some), length, dtype=torch.long)
        labels = torch.full((len(some), length), -100)
        for i, text in enumerate(some):
            row = torch.tensor(text.tokens)
            tokens[i, : len(row)] = row
            labels[i, text.start : len(row)] = row[text.start :]
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none"
        )
        scored = (labels[:, 1:] != -100).sum(dim=1)
        adam.zero_grad()
        (each.sum(dim=1) / scored).mean().backward()
        adam.step()


def _memory(given: Any, edits: Any, parts: tuple[int, int, int]) -> None:
    """Print the peak of a run of one epoch, and what it should hold."""
    bare, known = _anonymous.bare(), _anonymous.bare(KNOWN.format(base=str(given.base)))
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "edits.jsonl", str(Path(folder) / "patch.safetensors")
        file.write_text("".join(json.dumps(words_of(edit)) + "\n" for edit in edits))
        words = ["edit", str(given.base), str(file), out, "--layer", str(given.layer), "--quiet"]
        words += ["--set", "epochs=1", "--set", f"batch={given.batch}"]
        words += ["--set", "learning_rate=2e-3"]
        peak = _anonymous.peak([sys.executable, "-m", "mergekit_ft", *words]) - bare
    print(f"peak of a run: {peak:.0f} MiB beyond the interpreter with torch ({bare:.0f} MiB),")
    print(
        f"{peak + bare - known:.0f} beyond one that has imported transformers and read the config"
    )
    above, masters, cached = (part / 2**20 for part in parts)
    print(f"and tokenizer; weights above {above:.0f}, 16 bytes an entry tuned {masters:.0f}, kept")
    print(f"texts {cached:.0f}: {above + masters + cached:.0f} MiB")


if __name__ == "__main__":
    main()
