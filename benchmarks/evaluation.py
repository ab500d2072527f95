"""How fast answers and losses come, against transformers' own generate() and labels.

    python benchmarks/evaluation.py [MODEL] [--rows 16] [--tokens 32]

MODEL is a checkpoint with a tokenizer; without one a random Llama of 4 layers is made. Prompts are
of many lengths. Answers: one batch, greedy, as left-padded batch in generate(). Losses: batches of
like length, against one forward with labels for each batch of the same size in the order given.
Runs take turns, five of each; medians are told.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.two_experts.tiny import make_tiny
from mergekit_ft.data.rows import UNSCORED, Sample
from mergekit_ft.evaluation.scoring import scored
from mergekit_ft.models.decoding import Stop, answers, padded
from mergekit_ft.models.opening import open_speaker, quiet
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.resolution.opening import reference_of

RUNS = 5


def main() -> None:
    """Print medians and ratios."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("model", type=Path, nargs="?")
    asked.add_argument("--rows", type=int, default=16)
    asked.add_argument("--tokens", type=int, default=32)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet():
        if given.model is None:
            make_tiny(Path(folder) / "tiny")
        who = open_speaker(reference_of(str(given.model or Path(folder) / "tiny")))
        dice = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 120, (4 * given.rows,), generator=dice).tolist()
        texts = [torch.randint(5, 250, (n,), generator=dice).tolist() for n in lengths]
        _answers(who, texts[: given.rows], given.tokens)
        _losses(who, texts, given.rows)


def _answers(who: ModelSpeaker, prompts: list[list[int]], most: int) -> None:
    tokens, mask = padded(prompts, 0, left=True)
    model: Any = who.model

    def theirs() -> Any:
        with torch.no_grad():
            said = model.generate(
                tokens, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=0
            )
        return said[:, tokens.shape[1] :].tolist()

    def ours() -> Any:
        return dict(answers(who, prompts, Stop(most=most), batch=len(prompts)))

    same = sum(
        list(ours()[i].tokens) == row[: len(ours()[i].tokens)] for i, row in enumerate(theirs())
    )
    mine, other = _turns(ours, theirs)
    said = sum(len(answer.tokens) for answer in ours().values())
    print(
        f"answers: {len(prompts)} prompts, {said} tokens, {same} as generate's: {mine:.2f} s, "
        f"generate {other:.2f} s, ratio {mine / other:.2f}"
    )


def _losses(who: ModelSpeaker, texts: list[list[int]], batch: int) -> None:
    samples = [Sample(tuple(text), tuple(text)) for text in texts]
    model: Any = who.model

    def theirs() -> Any:
        total = 0.0
        for start in range(0, len(texts), batch):
            tokens, mask = padded(texts[start : start + batch], 0, left=False)
            labels = tokens.masked_fill(mask == 0, UNSCORED)
            with torch.no_grad():
                said = model(tokens, attention_mask=mask, labels=labels)
            total += float(said.loss) * int((labels[:, 1:] != UNSCORED).sum())
        return total

    def ours() -> Any:
        return sum(found.nats for found in scored(who, samples, batch))

    apart = abs(ours() - theirs()) / theirs()
    mine, other = _turns(ours, theirs)
    print(
        f"losses: {len(texts)} rows, {sum(map(len, texts))} tokens, {apart:.1e} apart: "
        f"{mine:.2f} s, labels {other:.2f} s, ratio {mine / other:.2f}"
    )


def _turns(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """Return the median seconds of both, run in turns."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for held, work in zip(spent, (one, other), strict=True):
            began = time.perf_counter()
            work()
            held.append(time.perf_counter() - began)
    return statistics.median(spent[0]), statistics.median(spent[1])


if __name__ == "__main__":
    main()
