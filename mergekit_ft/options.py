"""How a plan is carried out, and who watches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mergekit_ft.errors import OperatorError


@dataclass(frozen=True)
class Options:
    """How a plan is carried out; none of these changes a byte, but for `max_shard_size`'s files."""

    memory: int = 2**30  # bytes for blocks
    threads: int | None = None  # None: one a core, at most 8; 2 where a GPU computes
    device: str = "cpu"  # cpu, cuda, cuda:N, mps, auto
    max_shard_size: int | None = None  # bytes; None keeps the base's files
    resume: bool = False
    overwrite: bool = False
    offline: bool = False
    allow_pickle: bool = False
    allow_non_finite: bool = False
    allow_unchanged: bool = False
    copy_code: bool = False
    strict: bool = False  # what the inputs disagree on is an error
    lenient: bool = False  # set aside, with remarks, what mergekit 0.1.5 reads without effect

    @property
    def torch_device(self) -> torch.device:
        """Return the device, if torch has it here."""
        return _device(self.device)

    @property
    def workers(self) -> int:
        """Return the number of threads."""
        usual = min(8, os.cpu_count() or 1) if self.torch_device.type == "cpu" else 2
        return self.threads or usual

    def kept(self) -> dict[str, Any]:
        """Return the options that a byte of the output can depend on."""
        names = ("max_shard_size", "allow_non_finite", "copy_code", "allow_pickle", "lenient")
        return {"device": self.torch_device.type, **{name: getattr(self, name) for name in names}}


class Progress(Protocol):
    """Someone who watches."""

    def start(self, total_bytes: int, what: str) -> None:
        """Hear how many bytes will be read and written."""

    def advance(self, nbytes: int) -> None:
        """Hear of bytes read or written; called from any thread."""

    def close(self) -> None:
        """Hear that it is over."""


class Unwatched:
    """Nobody watches."""

    def start(self, total_bytes: int, what: str) -> None:
        """Ignore it."""

    def advance(self, nbytes: int) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Ignore it."""


def _device(name: str) -> torch.device:
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if best == "cpu" and torch.backends.mps.is_available() else best
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise OperatorError(f"no device is called {name!r}; use cpu, cuda, cuda:N or mps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True):
        raise OperatorError(
            f"{name}: torch sees no {device.type.upper()} device here; use --device cpu"
        )
    if device.type == "cuda" and device.index and device.index >= torch.cuda.device_count():
        raise OperatorError(f"{name}: torch sees CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return device
