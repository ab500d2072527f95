"""MEMIT, mass-editing memory in a transformer (Meng et al. 2023, arXiv:2210.07229, algorithm 1).

Of n edits and layers l_1 .. l_m, at the matrices W_l that end their MLPs, t* the last token of each
subject:

    values   z_i = h_i + delta_i, found by descent; h_i leaves the last layer l_m at t*
    for l in l_1 .. l_m, with all updates below in place:
        keys       K_l (d_in, n): what W_l is given at t*, half of the prompt alone and half the
                   mean behind 5 contexts
        residual   R_l = (Z - H) / (layers left, l included),  H measured anew
        update     W_l += R_l K_l^T (weight C_l + K_l K_l^T)^-1
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mergekit_ft.algebra.associations import Metric, regularised
from mergekit_ft.recalling import Memory, Solver
from mergekit_ft.rewriting import Editor


class Memit(Solver, Editor):
    """Facts written together into several layers."""

    contexts: ClassVar[tuple[tuple[int, int], ...]] = ((10, 1),)
    span: ClassVar[tuple[float, float]] = (4 / 32, 8 / 32)

    weight: float | None = Field(
        None, gt=0, description="lambda: what C weighs against the edits; None: d_in"
    )

    def solve(self, memory: Memory) -> None:
        """Write the edits, all at once, into a layer after another."""
        layers = self.written(memory.layers)
        values = memory.wanted(layers[-1], "layer", self.descent)
        for number, layer in enumerate(layers):
            left = values - memory.values(layers[-1], "layer")
            residual = left / (len(layers) - number)
            keys, metric = memory.keys(layer, 0.5), Metric(memory.second(layer))
            weight = self.weight or float(len(keys))  # k^T C^-1 k is about d_in for usual keys
            memory.write(layer, regularised(keys, residual, metric, weight))
