"""ROME, rank-one model editing (Meng et al. 2022, arXiv:2202.05262, section 3.1).

Edits come one after another, each into the model as those before left it. Of an edit, at the matrix
W (with bias b) that ends the MLP of layer l, and t* the subject's last token:

    key      k = mean of what W is given at t*, over the prompt alone and behind 20 contexts
    value    v = v_0 + delta, found by descent; v_0 is what comes out of W at t*
    update   W += (v - b - W k) (C^-1 k)^T / (k^T C^-1 k),  C = E[k k^T] over text

k is the same on both sides (R-ROME: Gupta et al. 2024, arXiv:2403.07175), so W k + b = v after.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from mergekit_ft.algebra.associations import Metric, exact
from mergekit_ft.recalling import Memory, Solver
from mergekit_ft.rewriting import Editor

TEXTS = 21  # the prompt alone and its contexts


class Rome(Solver, Editor):
    """Facts written one after another into one layer."""

    contexts: ClassVar[tuple[tuple[int, int], ...]] = ((5, 2), (10, 2))
    span: ClassVar[tuple[float, float]] = (5 / 32, 5 / 32)

    steps: int = Field(20, ge=1, description="looks at the loss while a value is sought")
    clamp: float = Field(4.0, gt=0, description="most that a value moves, by its own norm")
    covariance: bool = Field(True, description="whether C is of text; false: C = I, no text needed")

    @field_validator("layers")
    @classmethod
    def _one(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and len(layers) != 1:
            raise ValueError(f"rome writes into one layer; got {list(layers)}")
        return layers

    @property
    def wants_statistics(self) -> bool:
        """Say whether it needs E[k k^T]."""
        return self.covariance

    def solve(self, memory: Memory) -> None:
        """Write the edits, each into the model that those before have made."""
        (layer,) = self.written(memory.layers)
        metric = Metric(memory.second(layer)) if self.covariance else None
        for number in range(memory.count):
            edit = memory.some(number, number + 1)
            key = edit.keys(layer, 1 / TEXTS)
            value = edit.wanted(layer, "matrix", self.descent)
            residual = value - edit.answers(layer, key)
            memory.write(layer, exact(key[:, 0], residual[:, 0], metric))
