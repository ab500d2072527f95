"""HFT, half fine-tuning (Hui et al. 2024, arXiv:2404.18466), selection by category.

In every block, by a draw that holds for the run:

    attention      2 of {q, k, v, o} train
    feed-forward   2 of {up, gate, down} train in a random half of the blocks, 1 in the others
    norms          1 of 2 trains
    beside         embeddings and the head always train

A matrix's bias goes with it. Fused matrices (qkv, gate_up) are one. `redraw` draws anew on the way:
the newly frozen keep what they learned and lose their optimizer state.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mergekit_ft.algebra.halves import half
from mergekit_ft.learning import Selection, Subject, Tuner


class Hft(Tuner):
    """Half of each block trains."""

    learning_rate: ClassVar[float] = 2e-5  # ours, as for full fine-tuning

    redraw: int | None = Field(None, ge=1, description="steps between two draws; None: never")

    def select(self, subject: Subject, phase: int) -> Selection:
        """Draw the half."""
        return self._drawn(subject, 0)

    def due(self, step: int, steps: int) -> bool:
        """Say whether the half is drawn anew, and more steps follow."""
        return self.redraw is not None and step % self.redraw == 0 and step < steps

    def reselect(self, subject: Subject, phase: int, step: int, now: Selection) -> Selection:
        """Draw another half."""
        return self._drawn(subject, step)

    def _drawn(self, subject: Subject, step: int) -> Selection:
        chosen = half(subject.parameters, subject.places, subject.seed, step)
        return Selection(whole=tuple(name for name in subject.parameters if name in chosen))
