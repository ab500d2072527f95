"""Smooth convex functions of few variables, minimised in a box by projected Newton steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError

Function = Callable[[Tensor], tuple[float, Tensor, Tensor]]  # (k,) -> value, (k,), (k, k)
STEPS, HALVINGS = 100, 30  # most
TOLERANCE = 1e-9  # of the projected gradient
ROUNDING = 1e-14  # of values: what a step this near the minimum may seem to rise by


@dataclass(frozen=True)
class Minimum:
    """Where a function is least in a box."""

    at: Tensor  # (k,) float64
    value: float
    gradient: Tensor
    hessian: Tensor
    steps: int


def minimise(function: Function, start: Tensor, low: Tensor, high: Tensor) -> Minimum:
    """Return the minimum in [low, high], which may be infinite.

    OperatorError where a hundred steps do not find it.
    """
    x = start.double().clamp(low, high)
    value, gradient, hessian = function(x)
    for step in range(STEPS + 1):
        residual = (x - (x - gradient).clamp(low, high)).abs().max()
        if not bool(torch.isfinite(residual)):
            raise OperatorError("the fit met values that are not numbers")
        if residual <= TOLERANCE:
            return Minimum(x, value, gradient, hessian, step)
        moved = _searched(
            function, x, value, gradient, _direction(x, gradient, hessian, low, high), low, high
        )
        if moved is None:  # rounding is all that is left
            if residual <= 1e3 * TOLERANCE:
                return Minimum(x, value, gradient, hessian, step)
            break
        x, value, gradient, hessian = moved
    raise OperatorError(
        "the fit does not settle: the experts' moves are too alike; raise ridge, or drop one"
    )


def _direction(x: Tensor, gradient: Tensor, hessian: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the Newton step among the variables that no bound holds."""
    held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
    free = (~held).nonzero()[:, 0]
    direction = torch.zeros_like(x)
    if len(free):
        part = hessian[free][:, free]
        damping = 1e-12 * (1.0 + float(part.diagonal().max()))
        part = part + damping * torch.eye(len(free), dtype=part.dtype)
        direction[free] = -torch.linalg.solve(part, gradient[free])
    return direction


def _searched(
    function: Function,
    x: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
    low: Tensor,
    high: Tensor,
) -> tuple[Tensor, float, Tensor, Tensor] | None:
    """Return the first of x + t direction, t halved again and again, that is enough lower."""
    t, slack = 1.0, ROUNDING * (1 + abs(value))
    for _ in range(HALVINGS):
        there = (x + t * direction).clamp(low, high)
        if bool((there == x).all()):
            return None
        found = function(there)
        if found[0] <= value + 1e-4 * float(gradient @ (there - x)) + slack:
            return (there, *found)
        t /= 2
    return None
