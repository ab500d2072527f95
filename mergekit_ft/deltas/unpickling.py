"""Pickles of other tools, read by torch's reader of weights, which calls nothing that they name.

That reader knows tensors, numbers, lists and maps. composable-sft also holds one number of numpy
per tensor; the three names that make it are allowed, and make nothing but a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_ft.errors import SourceError


def load(file: Path) -> Any:
    """Return what a file of torch.save holds: tensors, numbers, lists and maps, or refuse."""
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    try:
        with _numbers_of_numpy():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it meets: pickle, zip, runtime errors
        text = str(error)
        why = f"{text.splitlines()[0] if text else type(error).__name__}"
        if "Weights only load failed" in text or "Unsupported" in text:
            why = "it holds more than tensors and numbers, and none of it was run"
        raise SourceError(f"{file}: cannot be read: {why}") from error


@contextmanager
def _numbers_of_numpy() -> Iterator[None]:
    """Let torch read an int64 of numpy, under the name of numpy 2 and of numpy 1, meanwhile."""
    core = np._core if hasattr(np, "_core") else np.core
    scalar: Any = core.multiarray.scalar
    kind = type(np.dtype(np.int64))
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([scalar, np.dtype, kind])
    try:
        torch.serialization.add_safe_globals(
            [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        )
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
