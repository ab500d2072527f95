"""Interpolation on the sphere (slerp, Shoemake 1985)."""

from __future__ import annotations

import math
from typing import NamedTuple

STRAIGHT = 0.9995  # above this |cosine| the arc is taken for a line
TINY = 1e-8  # a norm this small is taken for 1


class ArcWeights(NamedTuple):
    """The weights of the two ends."""

    first: float
    second: float
    straight: bool  # a line: the weights are 1-t and t


def arc_weights(t: float, squares: tuple[float, float], product: float) -> ArcWeights:
    """Return the weights at t of vectors a and b, from |a|^2, |b|^2 and a.b."""
    if squares[0] == squares[1] == product:  # a is b, maybe too short for the cosine to say so
        return ArcWeights(1.0 - t, t, True)
    norms = [math.sqrt(square) for square in squares]
    first, second = (norm if norm > TINY else 1.0 for norm in norms)
    cosine = min(1.0, max(-1.0, product / (first * second)))
    if not abs(cosine) <= STRAIGHT:
        return ArcWeights(1.0 - t, t, True)
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return ArcWeights(math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine, False)
