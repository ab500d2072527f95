"""What fused decoding costs a token, against the large model alone.

    python benchmarks/fused_decoding.py LARGE SMALL EXPERT [--tokens N] [--pairs N]

Models of one vocabulary. Each pair times the large model alone and the fused models, by fixed
factors, by the bracketed search and by the paper's grid, over the same prompts and as many tokens.
Printed: medians of ratios, the ratio that the models' sizes promise, and the looks of the search.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mergekit_ft.algebra.shifting import USUAL, search
from mergekit_ft.fusion.speaking import Fixed, FusedSpeaker, Searched
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.models.speaker import Speaker
from mergekit_ft.plan import ModelReference

TEXT = "The weather in the mountains changes quickly, so take"


def main() -> None:
    """Print the figures."""
    asked = argparse.ArgumentParser(description=__doc__)
    for role in ("large", "small", "expert"):
        asked.add_argument(role)
    asked.add_argument("--tokens", type=int, default=16)
    asked.add_argument("--prompts", type=int, default=4)
    asked.add_argument("--pairs", type=int, default=3)
    given = asked.parse_args()
    opened = {
        role: open_speaker(ModelReference(model=getattr(given, role)))
        for role in ("large", "small", "expert")
    }
    large, small, experts = opened["large"], opened["small"], {"expert": opened["expert"]}
    ways: dict[str, Speaker] = {
        name: FusedSpeaker(large, experts, rule, small=small)
        for name, rule in {
            "fixed": Fixed((1.0,)),
            "bracket": Searched(),
            "grid": Searched(how="grid"),
        }.items()
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.pairs):
        alone = seconds(large, given)
        for name, speaker in ways.items():
            ratios[name].append(seconds(speaker, given) / alone)
    size = {role: sum(p.numel() for p in s.model.parameters()) for role, s in opened.items()}
    promised = sum(size.values()) / size["large"]
    print(f"weights of all models over the large one's: {promised:.2f}")
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} x the large model alone ({found})")
    print(f"looks at the vocabulary, a place and expert: {looks(opened):.1f}, of 21 on the grid")


def seconds(speaker: Any, given: argparse.Namespace) -> float:
    """Return the time of some tokens after the prompts were read."""
    tokens = torch.tensor([speaker.tokenizer(TEXT)["input_ids"]] * given.prompts)
    logits, state = speaker.begin(tokens, torch.ones_like(tokens))
    began = time.monotonic()
    for _ in range(given.tokens):
        logits, state = speaker.step(state, logits.argmax(dim=-1))
    return time.monotonic() - began


def looks(opened: dict[str, Any]) -> float:
    """Return how often the search goes through the vocabulary at a place of a text."""
    tokens = torch.tensor([opened["large"].tokenizer(TEXT)["input_ids"]])
    said = {role: s.read(tokens, torch.ones_like(tokens))[0] for role, s in opened.items()}
    found = search(said["large"], said["small"], [said["expert"]], [USUAL])
    return float(found.evaluations.double().mean())


if __name__ == "__main__":
    main()
