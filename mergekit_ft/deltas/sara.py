"""SaRA's file (Hu et al. 2024): the values of all weights that were smaller than a threshold.

The file has an integer for each parameter, in the order of `model.parameters()`, and no places:
the entries are those where |theta_0| < threshold. So the base, its dtype and the order decide what
every value is for. A checkpoint does not know that order; the model, built without weights, does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ft.deltas.moves import Move
from mergekit_ft.deltas.unpickling import load
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.skeleton import skeleton
from mergekit_ft.sources.source import Source


def read(
    path: Path,
    base: Source,
    *,
    threshold: float | None = None,
    order: Path | None = None,
) -> list[Move]:
    """Return what SaRA's file makes of a base: where it was trained, the values that are there."""
    held = load(path)
    values, limit = _parts(held, path, threshold)
    names = _names(base, order)
    if len(names) != len(values):
        raise SourceError(
            f"{path}: has values for {len(values)} parameters, and {base.reference} has "
            f"{len(names)}: it was trained on another model, or on a part of it (name it with "
            "--order)"
        )
    dtype = _trained_in(base, names, values, limit, path)
    moves = []
    for name, found in zip(names, values, strict=True):
        theta = base.tensor(name)
        indices = _mask(theta, limit, dtype).flatten().nonzero().flatten()
        moves.append(Move(name, "replace", tuple(theta.shape), found.flatten(), indices))
    return moves


def _parts(held: Any, path: Path, threshold: float | None) -> tuple[list[Tensor], float]:
    """Return the values by parameter, and the threshold."""
    if not isinstance(held, dict) or not held:
        raise SourceError(f"{path}: is no map from numbers to values, as SaRA writes it")
    values = {key: value for key, value in held.items() if key != "threshold"}
    if set(values) != set(range(len(values))):
        raise SourceError(f"{path}: its keys are not the numbers 0 to {len(values) - 1}")
    strange = [key for key, value in values.items() if not isinstance(value, Tensor)]
    if strange:
        raise SourceError(f"{path}: what stands under {strange[0]} is no tensor")
    told = held.get("threshold")
    if told is not None and threshold is not None and float(told) != threshold:
        raise SourceError(f"{path}: says threshold {float(told)}, not {threshold}; leave it out")
    limit = threshold if told is None else float(told)
    if limit is None:
        raise SourceError(f"{path}: says no threshold; give the one of the training: --threshold")
    return [values[key].detach() for key in range(len(values))], limit


def _names(base: Source, order: Path | None) -> list[str]:
    """Return the base's names in the order of the model's parameters, tied ones once."""
    if order is not None:
        lines = order.read_text(encoding="utf-8").splitlines()
        wanted: Sequence[str] = [line.strip() for line in lines if line.strip()]
        own = {name: name for name in base}
    else:
        built = skeleton(base)
        if built.kinds is None:
            raise SourceError(
                f"{built.note or base.reference}: the order of its parameters is not known; write "
                "the names of model.named_parameters(), one a line, to a file, and name it with "
                "--order"
            )
        wanted, own = built.parameters, {built.rename(name): name for name in base}
    return [_own(name, own, base) for name in wanted]


def _own(name: str, own: Mapping[str, str], base: Source) -> str:
    found = own.get(name) or base.locate(name)
    if found is None:
        raise SourceError(
            f"{base.reference}: has no tensor for the model's parameter {name}: its file lays out "
            "its weights in another way than the model; save it again from the model"
        )
    return found


def _mask(theta: Tensor, threshold: float, dtype: torch.dtype | None) -> Tensor:
    """Say which weights are below the threshold, as torch compares them in a dtype."""
    return theta.to(dtype if dtype is not None else theta.dtype).abs() < threshold


def _trained_in(
    base: Source, names: Sequence[str], values: Sequence[Tensor], threshold: float, path: Path
) -> torch.dtype | None:
    """Return the dtype in which every count agrees: float32, or None for the stored one.

    In 16 bits the threshold itself is rounded before it is compared, so the two can differ.
    """
    wrong: dict[torch.dtype | None, tuple[str, int, int]] = {}
    for name, found in zip(names, values, strict=True):
        theta = base.tensor(name)
        for dtype in {None, torch.float32} - wrong.keys():
            count = int(_mask(theta, threshold, dtype).sum())
            if count != found.numel():
                wrong[dtype] = (name, count, found.numel())
        if len(wrong) == 2:
            break
    fitting = [dtype for dtype in (torch.float32, None) if dtype not in wrong]
    if fitting:
        return fitting[0]
    first, count, there = wrong[torch.float32]
    raise SourceError(
        f"{path}: {there} values for {first}, of which {count} weights in {base.reference} are "
        f"below {threshold}: it was trained on another model, in another order or dtype"
    )
