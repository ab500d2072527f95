"""Tensors put aside and taken again: in memory up to a budget, in a file past it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ft.blocks import view_of
from mergekit_ft.errors import WriteError

BUDGET = 1 << 30  # bytes


class Shelf:
    """Holds tensors by key; what is put under a key again may not be larger."""

    def __init__(self, budget: int = BUDGET, folder: Path | None = None) -> None:
        self._budget, self._folder = budget, folder
        self._near: dict[Hashable, Tensor] = {}
        self._far: dict[Hashable, tuple[int, int, Tensor]] = {}  # start, room, an empty likeness
        self._end = 0
        self.held = 0  # bytes in memory
        self._file: int | None = None

    @property
    def filed(self) -> int:
        """Return the bytes that lie in the file."""
        return self._end

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Put a tensor aside; the host keeps it."""
        kept = tensor.detach().contiguous().cpu()
        size = kept.numel() * kept.element_size()
        before = self._near.pop(key, None)
        if before is not None:
            self.held -= before.numel() * before.element_size()
        if key not in self._far and self.held + size <= self._budget:
            self._near[key] = kept.clone() if kept.data_ptr() == tensor.data_ptr() else kept
            self.held += size
            return
        start, room, _ = self._far.get(key, (self._end, size, kept))
        if size > room:
            raise ValueError(f"{key} had {room} bytes, not {size}")
        if key not in self._far:
            self._end += size
        self._far[key] = (start, room, torch.empty(kept.shape, dtype=kept.dtype, device="meta"))
        self._write(kept, start)

    def get(self, key: Hashable) -> Tensor:
        """Return a tensor that was put aside, on the host; it may be the one that is held."""
        if key in self._near:
            return self._near[key]
        start, _, like = self._far[key]
        made = torch.empty(like.shape, dtype=like.dtype)
        if made.numel():
            os.preadv(self._open(), [view_of(made)], start)
        return made

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def _open(self) -> int:
        if self._file is None:
            try:
                self._file, name = tempfile.mkstemp(prefix="mergekit-ft-", dir=self._folder)
                os.unlink(name)  # a killed run leaves nothing
            except OSError as error:
                raise WriteError(f"no file for what does not fit into memory: {error}") from error
        return self._file

    def _write(self, tensor: Tensor, start: int) -> None:
        left, file = view_of(tensor), self._open()
        try:
            while len(left):
                done = os.pwrite(file, left, start)
                left, start = left[done:], start + done
        except OSError as error:
            raise WriteError(
                f"what does not fit into memory cannot be put aside on disk: {error.strerror}; "
                "raise --memory, or point TMPDIR to a disk with room"
            ) from error

    def close(self) -> None:
        """Let go of everything."""
        self._near.clear()
        self._far.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None
