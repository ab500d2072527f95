"""The self-test: the adapter is read back, as peft would, and compared with the deltas again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ft.blocks import Crew, Job, Station
from mergekit_ft.errors import WriteError
from mergekit_ft.sources import Adapter, open_adapter
from mergekit_ft.sources.low_rank import Stored

AGREED = 1e-6  # of the energy that the files keep, with the energy that was worked out
ROWS = 512  # of a product at a time

Check = tuple[str, float, float, Callable[[], Sequence[Tensor]], Callable[[float, float], None]]


def measure(folder: Path, checks: Iterable[Check], threads: int) -> Adapter:
    """Compare each module of a written adapter with the matrix that it stands for.

    A check is the module, the energies of the matrix and of the product as worked out, what gives
    the matrix (or two factors of it), and who hears of the share kept and the relative residual.
    """
    adapter = open_adapter(str(folder))
    Crew(threads, torch.device("cpu")).run(_jobs(adapter, checks))
    return adapter


def _factors(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """Return (out, rank) with the scale in it and (rank, in), in float64."""
    held = adapter.factors[module]
    assert held.a is not None and held.b is not None
    left, right = (Stored(adapter.reader, info).whole().double() for info in (held.b, held.a))
    return left.mul_(adapter.config.scale_of(module)), right


def _jobs(adapter: Adapter, checks: Iterable[Check]) -> Iterator[Job]:
    for check in checks:
        yield _job(adapter, check)


def _job(adapter: Adapter, check: Check) -> Job:
    module, total, kept, matrix, tell = check

    def piece(station: Station) -> None:
        missed = _missed(matrix(), *_factors(adapter, module))
        share = 1.0 - missed / total
        if not abs(share - kept / total) <= AGREED:
            raise WriteError(
                f"self-test: {module} keeps {share:.9f} of its energy by the written files, and "
                f"{kept / total:.9f} was worked out; nothing was left behind"
            )
        tell(share, math.sqrt(missed / total))

    yield [piece]


def _missed(wanted: Sequence[Tensor], left: Tensor, right: Tensor) -> float:
    """Return the energy of what is wanted - left @ right, a few rows at a time."""
    first, *rest = wanted
    parts = []
    for start in range(0, len(first), ROWS):
        rows = first[start : start + ROWS]
        for factor in rest:
            rows = rows @ factor
        parts.append(float((left[start : start + ROWS] @ right).sub_(rows).square_().sum()))
    return math.fsum(parts)
