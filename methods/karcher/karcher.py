"""The Karcher mean of models' directions (Karcher 1977), with the mean of their norms.

For k models theta_i with norms n_i and directions u_i = theta_i / n_i, each tensor one vector; a_i
is 1/k, or 1/r where r < k of them are longer than `tol`:

    m      = sum_i a_i u_i, divided by its norm; u_1 where that is below `tol`
    repeat up to max_iter times:
    phi_i  = the angle between m and u_i
    T      = sum_i a_i phi_i / sin(phi_i) (u_i - cos(phi_i) m)       0 for phi_i below `tol`
    m      = cos(|T|) m + sin(|T|) T / |T|                     until |T| is below `tol`
    theta  = (sum_i n_i / k) m

Every m lies in the span of the u_i, so the iteration is one over k coefficients c, m = sum_i c_i
u_i, and needs of the models only their dot products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra import gram
from mergekit_ft.algebra.gram import Matrix
from mergekit_ft.contract import About, Base, Block, Operator, Place, Survey, shared

OPPOSITE = 1e-12  # up to this sine an angle, not below `tol`, is half a turn: no way is shortest


class Karcher(Operator):
    """The mean of models' directions on the sphere, with the mean of their norms."""

    base: ClassVar[Base] = Base.IGNORED
    yields_delta: ClassVar[bool] = False

    max_iter: int = shared(10, ge=0, description="most steps towards the mean")
    tol: float = shared(1e-5, ge=0, description="a step, an angle or a norm as short counts as 0")

    def copies(self, k: int, name: str, place: Place) -> int | None:
        """Return the only model."""
        return 0 if k == 1 else None

    def survey(self, about: About) -> Survey:
        """Find what each model counts for in the mean, from their dot products."""
        (rows,) = yield (gram.measure(),)
        found = gram.matrix(rows, len(about.ids))
        norms = np.sqrt(found.diagonal())
        heard = np.flatnonzero(norms > self.tol)
        if not len(heard):
            return [1.0 / len(norms)] * len(norms)
        angles = found[np.ix_(heard, heard)] / np.outer(norms[heard], norms[heard])
        weights = np.zeros(len(norms))
        weights[heard] = self._coefficients(angles) * norms.mean() / norms[heard]
        return weights.tolist()

    def merge(self, block: Block, finding: Any) -> Tensor:
        """Return (n,) the mean."""
        return gram.combine(block.tuned, finding)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the mean in float64, by the vectors themselves."""
        norms = [float(x.norm()) for x in tuned]
        units = [x / n for x, n in zip(tuned, norms, strict=True) if n > self.tol]
        if not units:
            return torch.stack([*tuned]).mean(0)
        mean = torch.stack(units).mean(0)
        mean = units[0] if float(mean.norm()) < self.tol else mean / mean.norm()
        for _ in range(self.max_iter):
            step = torch.stack([self._tangent(mean, unit) for unit in units]).mean(0)
            size = step.norm()
            if float(size) < self.tol or not float(size):
                break
            mean = torch.cos(size) * mean + torch.sin(size) / size * step
            mean = mean / mean.norm()
        return sum(norms) / len(norms) * mean

    def _coefficients(self, cosines: Matrix) -> Matrix:
        """Return the mean's coefficients over the directions, from their cosines."""
        k = len(cosines)
        mean = np.full(k, 1.0 / k)
        length = gram.norm(mean, cosines)
        mean = np.eye(k)[0] if length < self.tol else mean / length
        for _ in range(self.max_iter):
            step = self._step(mean, cosines)
            size = gram.norm(step, cosines)
            if size < self.tol or not size:
                break
            mean = np.cos(size) * mean + np.sin(size) / size * step
            mean = mean / gram.norm(mean, cosines)
        return mean

    def _step(self, mean: Matrix, cosines: Matrix) -> Matrix:
        """Return the coefficients of T."""
        k = len(mean)
        to_mean = (cosines * mean).sum(1).clip(-1.0, 1.0)
        step = np.zeros(k)
        for unit, cosine in zip(np.eye(k), to_mean, strict=True):
            step += self._stretch(float(np.arccos(cosine))) / k * (unit - cosine * mean)
        return step

    def _stretch(self, angle: float) -> float:
        """Return phi / sin(phi), 0 where the way from m to u is none or none is the shortest."""
        sine = float(np.sin(angle))
        return angle / sine if angle >= self.tol and sine > OPPOSITE else 0.0

    def _tangent(self, mean: Tensor, unit: Tensor) -> Tensor:
        cosine = (mean * unit).sum().clamp(-1.0, 1.0)
        return self._stretch(float(torch.acos(cosine))) * (unit - cosine * mean)
