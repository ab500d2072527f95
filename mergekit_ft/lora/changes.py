"""What changed, tensor by tensor: the delta of a matrix, the energy of another tensor's change."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_ft.errors import OperatorError
from mergekit_ft.lora.pairs import Pair
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.dtypes import SIZE, TORCH

RUN = 1 << 20  # elements read at a time of a tensor that need not be whole


def delta(base: Source, tuned: Source, pair: Pair) -> Tensor:
    """Return (out, in) float64: tuned - base, as the module computes with it."""
    change = tuned.tensor(pair.tuned.name).double()
    change.sub_(base.tensor(pair.base.name))
    _require_finite(base, tuned, pair, change)
    return change.T if pair.kind == "conv1d" else change


def energy(base: Source, tuned: Source, pair: Pair) -> float:
    """Return the energy of a tensor's change, run by run, over the rows that both have."""
    common = min(pair.base.numel, pair.tuned.numel)
    parts = []
    for start in range(0, common, RUN):
        stop = min(start + RUN, common)
        change = _run(tuned, pair.tuned, start, stop).double()
        change.sub_(_run(base, pair.base, start, stop))
        _require_finite(base, tuned, pair, change)
        parts.append(float(change.square_().sum()))
    return math.fsum(parts)


def runs(source: Source, info: TensorInfo) -> Iterator[bytearray]:
    """Yield the bytes of a tensor."""
    step = RUN * SIZE[info.dtype]
    for start in range(0, info.nbytes, step):
        data = bytearray(min(step, info.nbytes - start))
        source.read_into(info.name, start, memoryview(data))
        yield data


def whole_bytes(pair: Pair, rank: int | None) -> int:
    """Return the memory that a matrix takes while it is decomposed, in bytes."""
    rows, columns = pair.base.shape
    short, long = sorted((rows, columns))
    width = short if rank is None else min(rank, short)
    stored = pair.base.nbytes + pair.tuned.nbytes
    return stored + 8 * (rows * columns + 6 * short * short + 3 * width * (short + long))


def _run(source: Source, info: TensorInfo, start: int, stop: int) -> Tensor:
    dtype = TORCH[info.dtype]
    data = bytearray((stop - start) * dtype.itemsize)
    source.read_into(info.name, start * dtype.itemsize, memoryview(data))
    return torch.frombuffer(data, dtype=dtype)


def _require_finite(base: Source, tuned: Source, pair: Pair, change: Tensor) -> None:
    if bool(change.isfinite().all()):
        return
    for source, info in ((tuned, pair.tuned), (base, pair.base)):
        for start in range(0, info.numel, RUN):
            values = _run(source, info, start, min(start + RUN, info.numel)).double()
            odd = values.isfinite().logical_not()
            if bool(odd.any()):
                at = int(odd.nonzero()[0])
                raise OperatorError(
                    f"{source.reference}: {info.name} holds {float(values[at])} at element "
                    f"{start + at}; repair the checkpoint, or leave the tensor out (--exclude)"
                )
