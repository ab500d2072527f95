"""AlphaEdit (Fang et al. 2025, arXiv:2410.02355): MEMIT that writes where the model does not look.

Of each layer l that is written, C_l = E[k k^T] over text and U_l (d_in, r) its eigenvectors whose
eigenvalue is below `threshold`: P_l = U_l U_l^T. Edits come in batches; of a batch

    values   z_i = h_i + delta_i, as in MEMIT
    for l in l_1 .. l_m, with all updates below in place:
        keys, residual   K_l and R_l as in MEMIT
        update           W_l += R_l K_l^T P_l (K_l K_l^T P_l + M_l P_l + ridge I)^-1
    then   M_l += K_l K_l^T  for each l, K_l as the batch left them

A key in which C sees nothing but the other directions gets what it got before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ft.algebra.associations import null_space, projected
from mergekit_ft.recalling import Memory, Solver
from mergekit_ft.rewriting import Editor


class AlphaEdit(Solver, Editor):
    """Facts written into the directions that the model does not use."""

    contexts: ClassVar[tuple[tuple[int, int], ...]] = ((10, 1),)
    span: ClassVar[tuple[float, float]] = (4 / 32, 8 / 32)

    threshold: float = Field(2e-2, gt=0, description="eigenvalues of C below it are of no use")
    ridge: float = Field(1.0, gt=0, description="what the update's own size weighs")
    batch: int = Field(100, ge=1, description="edits written at a time")

    def solve(self, memory: Memory) -> None:
        """Write the edits, a batch after another."""
        layers = self.written(memory.layers)
        bases = {layer: null_space(memory.second(layer), self.threshold) for layer in layers}
        earlier: dict[int, Tensor] = {}  # (d_in, m) keys of the batches before
        for start in range(0, memory.count, self.batch):
            edits = memory.some(start, min(start + self.batch, memory.count))
            self._write(edits, layers, bases, earlier)
            for layer in layers:
                before = [earlier[layer]] if layer in earlier else []
                earlier[layer] = torch.cat([*before, edits.keys(layer, 0.5)], dim=1)

    def _write(
        self,
        edits: Memory,
        layers: Sequence[int],
        bases: Mapping[int, Tensor],
        earlier: Mapping[int, Tensor],
    ) -> None:
        """Write a batch into a layer after another."""
        values = edits.wanted(layers[-1], "layer", self.descent)
        for number, layer in enumerate(layers):
            left = values - edits.values(layers[-1], "layer")
            residual = left / (len(layers) - number)
            before = earlier.get(layer)
            keys = edits.keys(layer, 0.5)
            edits.write(layer, projected(keys, residual, bases[layer], before, self.ridge))
