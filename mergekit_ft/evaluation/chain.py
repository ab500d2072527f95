"""What a chain of models that learn one task after another keeps and forgets.

With a[i][j] the figure on task j after stage i learned task i, for T tasks:

    average performance  1/T sum_j a[T][j]
    backward transfer    1/(T-1) sum_{j<T} (a[T][j] - a[j][j])
    forward transfer     1/(T-1) sum_{j>1} (a[j-1][j] - a[0][j])
    forgetting           1/(T-1) sum_{j<T} (max_{1<=i<T} a[i][j] - a[T][j])

The first three are Lopez-Paz and Ranzato's (2017, arXiv:1706.08840, section 2), where a[0] is a
model at random initialisation; here it is the model before stage 1, where that is given. Forgetting
is Chaudhry et al.'s (2018, arXiv:1801.10112). Of a measure whose lower values are better, the sign
of a is turned in all but the average, so that forgetting above 0 and backward transfer below 0 mean
that something got worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.errors import PlanError


@dataclass(frozen=True)
class Kept:
    """What one measure tells of a chain."""

    matrix: tuple[tuple[float, ...], ...]  # (stages, tasks)
    before: tuple[float, ...] | None  # (tasks,) of the model before stage 1
    average: float
    backward: float
    forgetting: float
    forward: float | None

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "matrix": [list(row) for row in self.matrix],
            "before": None if self.before is None else list(self.before),
            "average_performance": self.average,
            "backward_transfer": self.backward,
            "forgetting": self.forgetting,
            "forward_transfer": self.forward,
        }


def require_chain(models: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse models that cannot be the stages of these tasks."""
    if len(tasks) < 2 or len(models) - len(tasks) not in (0, 1):
        raise PlanError(
            f"a chain has two tasks or more and a model for each, after it learned that task, in "
            f"order (and first, perhaps, the model before all): here are {len(models)} models "
            f"({', '.join(models)}) and {len(tasks)} tasks ({', '.join(tasks)})"
        )


def kept(figures: Sequence[Sequence[float]], *, lower: bool = False) -> Kept:
    """Return what a chain keeps, by its figures (models, tasks); `lower` ones are better."""
    tasks = len(figures[0])
    before = tuple(figures[0]) if len(figures) > tasks else None
    stages = [tuple(row) for row in figures[-tasks:]]
    sign = -1.0 if lower else 1.0
    a = [[sign * value for value in row] for row in stages]
    last, earlier = a[-1], range(tasks - 1)
    forward = None
    if before is not None:
        gains = (a[j - 1][j] - sign * before[j] for j in range(1, tasks))
        forward = math.fsum(gains) / (tasks - 1)
    return Kept(
        tuple(stages),
        before,
        math.fsum(stages[-1]) / tasks,
        math.fsum(last[j] - a[j][j] for j in earlier) / (tasks - 1),
        math.fsum(max(a[i][j] for i in earlier) - last[j] for j in earlier) / (tasks - 1),
        forward,
    )
