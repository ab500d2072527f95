"""Full fine-tuning.

Every floating-point parameter trains: the gradient is dense, and AdamW (Loshchilov & Hutter 2017,
arXiv:1711.05101, Algorithm 2) keeps two moments of each. It is what the sparse tuners are compared
with, and what task vectors are usually made from.
"""

from __future__ import annotations

from typing import ClassVar

from mergekit_ft.learning import Selection, Subject, Tuner


class Full(Tuner):
    """Every parameter trains."""

    learning_rate: ClassVar[float] = 2e-5

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose every parameter."""
        return Selection(whole=tuple(subject.parameters))
