"""Arcee Fusion (Arcee AI 2024): of another model, only the changes that stand out are taken over.

For the base a and a model b, p = softmax(b) + 1e-8 and q = softmax(a) + 1e-8 along each row:

    KL     = sum over the row of p ln(p / q)
    s      = |b - a| KL                                     the importance of each element
    theta  = b where s >= s_50 + 1.5 (s_75 - s_25), else a

where s_q is the element of rank trunc(q/100 (n - 1)), from 0, of the tensor's n sorted importances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_ft.algebra import selection
from mergekit_ft.algebra.cells import cells, exact
from mergekit_ft.algebra.choice import bits_of, choose
from mergekit_ft.contract import About, Block, Grain, Measure, Operator, Survey, row_of

QUARTILES = (0.25, 0.5, 0.75)
SPREAD = 1.5  # quartile distances above the median an element stands out
LEAST = 1e-8  # added to every probability
AT = 1.0 - 1e-6  # of the threshold: what is as near below it as a rounding may be is at it
SHARE = 64  # of the memory a survey may keep, one part may hold the divergences of the rows
EACH = 16  # bytes that a row's divergence takes, and is copied

Divergences = np.ndarray[Any, np.dtype[np.float64]]  # (rows,), in host memory


class Found(NamedTuple):
    """What the survey finds."""

    threshold: float
    divergences: Divergences | None  # None: too many to keep, worked out again


class ArceeFusion(Operator):
    """Only the changes that stand out are taken over from another model."""

    tuned: ClassVar[tuple[int, int | None]] = (1, 1)
    yields_delta: ClassVar[bool] = False

    @property
    def grain(self) -> Grain:
        """Return whole rows: a softmax runs along each."""
        return Grain.ROW

    def scratch(self, k: int) -> int:
        """Return the rows that selecting three of one tensor's importances needs."""
        return selection.scratch(len(QUARTILES))

    def survey(self, about: About) -> Survey:
        """Find, exactly, the importance from which an element stands out."""
        counts = [about.numel - math.trunc(q * (about.numel - 1)) for q in QUARTILES]
        search = selection.largest(counts, _importance, about, len(QUARTILES), signed=False)
        if about.numel // row_of(about.shape) * EACH * SHARE > about.spare:
            cuts, divergences = (yield from search), None
        else:
            cuts, rows = yield from selection.alongside(search, DIVERGING)
            divergences = rows[:, 0].numpy()
        low, median, high = (cut.threshold for cut in cuts if cut is not None)
        return Found((median + SPREAD * (high - low)) * AT, divergences)

    def merge(self, block: Block, finding: Found) -> Tensor:
        """Return (n,) the other model's values where they stand out, else the base's."""
        threshold, divergences = finding
        if divergences is not None:
            first, rows = (x // row_of(block.shape) for x in (block.start, block.n))
            mine, like = divergences[first : first + rows, None], block.scratch
            _weigh(block, torch.tensor(mine, dtype=like.dtype, device=like.device))
        holds, found = bits_of(block.scratch[1]), block.scratch[2]
        torch.ge(_importance(block, 0), threshold, out=holds)
        return choose(holds, block.tuned[0], block.base, found)

    def reference(self, base: Tensor, tuned: Sequence[Tensor], about: About) -> Tensor:
        """Return the same in float64; sorts, where the survey selects."""
        b = tuned[0]
        importance = _scores(*(x.reshape(-1, row_of(tuple(base.shape))) for x in (base, b)))
        ordered = importance.flatten().sort().values
        ranks = [math.trunc(q * (len(ordered) - 1)) for q in QUARTILES]
        low, median, high = (float(ordered[rank]) for rank in ranks)
        stands_out = importance >= (median + SPREAD * (high - low)) * AT
        return torch.where(stands_out.view_as(base), b, base)


def _importance(block: Block, _: int) -> Tensor:
    """Return (n,) the importances in scratch row 0, worked out once for a block."""
    return _weigh(block, _divergences(block)) if block.made is None else block.made


def _diverging(block: Block) -> Tensor:
    """Return (m, 1) float64 the divergences of a block's rows, and leave its importances."""
    divergences = _divergences(block)
    _weigh(block, divergences)
    return exact(divergences)


def _divergences(block: Block) -> Tensor:
    """Return (m, 1) the divergences of a block's rows, worked out in float64."""
    length = row_of(block.shape)
    found = block.scratch.new_empty((block.n // length, 1))
    work = exact(block.base[:0]).new_empty((2, min(block.n, block.cell) // length, length))
    for run in cells(block.n, block.cell):
        rows = slice(run.start // length, run.stop // length)
        a, b = (x[run].view(-1, length) for x in (block.base, block.tuned[0]))
        found[rows].copy_(_divergence(a, b, work[:, : rows.stop - rows.start]))
    return found


def _weigh(block: Block, divergences: Tensor) -> Tensor:
    """Return (n,) the importances, by the (m, 1) divergences of the block's rows."""
    found = block.made = block.scratch[0]
    torch.sub(block.tuned[0], block.base, out=found).abs_()
    found.view(-1, row_of(block.shape)).mul_(divergences)
    return found


DIVERGING = Measure(_diverging, cells=True, host=lambda block, rows: rows)  # of rows, not of cells


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """Return the importances of (m, length) rows."""
    return (b - a).abs_().mul_(_divergence(a, b, torch.empty((2, *a.shape), dtype=a.dtype)))


def _divergence(a: Tensor, b: Tensor, work: Tensor) -> Tensor:
    """Return (m, 1) the divergence of (m, length) rows b from rows a, in (2, m, length) float64."""
    q, p = work
    of_q, of_p = _exponentials(a, q), _exponentials(b, p)
    logs = _in_place(np.log, torch.div(p, q, out=q))
    total = logs.mul_(p).sum(-1, keepdim=True).div_(of_p)
    both = 1.0 + LEAST * a.shape[-1]  # what the probabilities add up to
    return total.add_(torch.log(of_q / of_p), alpha=both).clamp_(min=0.0)


def _exponentials(rows: Tensor, into: Tensor) -> Tensor:
    """Make the rows' probabilities times what has to divide them; return that, (m, 1)."""
    into.copy_(rows).sub_(into.amax(-1, keepdim=True))
    total = _in_place(np.exp, into).sum(-1, keepdim=True)
    into.add_(total * LEAST)
    return total


def _in_place(function: np.ufunc, values: Tensor) -> Tensor:
    """Apply exp or log; in host memory by numpy, which takes half the time or less in float64."""
    if values.device.type == "cpu":
        function(values.numpy(), out=values.numpy())
        return values
    return values.exp_() if function is np.exp else values.log_()
