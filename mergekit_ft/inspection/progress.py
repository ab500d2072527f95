"""How far a merge is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from mergekit_ft.inspection.tables import size

EVERY = 5.0  # seconds between two lines at least
STEP = 0.1  # share of the whole between two lines at least
BATCH = 4 << 20  # bytes before the bar is told


class Bar:
    """A bar of bytes with rate and time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._pending = 0
        self._lock = threading.Lock()

    def start(self, total_bytes: int, what: str) -> None:
        """Draw the bar."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_bytes, desc=what, unit="B", unit_scale=True, leave=True, file=sys.stderr
        )

    def advance(self, nbytes: int) -> None:
        """Move the bar; surveys read more than the merge, so the end moves with it."""
        with self._lock:
            self._pending += nbytes
            if self._bar is not None and self._pending >= BATCH:
                self._flush()

    def close(self) -> None:
        """Leave the bar where it is."""
        with self._lock:
            if self._bar is not None:
                self._flush()
                self._bar.close()
                self._bar = None

    def _flush(self) -> None:
        bar, self._pending, moved = self._bar, 0, self._pending
        bar.total = max(bar.total, bar.n + moved)
        bar.update(moved)


class Lines:
    """A line when a tenth more is done, at most every few seconds."""

    def __init__(self) -> None:
        self._total, self._done, self._said = 0, 0, 0.0
        self._began = self._last = time.monotonic()
        self._lock = threading.Lock()

    def start(self, total_bytes: int, what: str) -> None:
        """Say what begins."""
        self._total, self._began = total_bytes, time.monotonic()
        self._last = self._began
        self._say(f"{what}: {size(total_bytes)} to move")

    def advance(self, nbytes: int) -> None:
        """Count, and say so where it is time."""
        with self._lock:
            self._done += nbytes
            share = self._done / max(self._total, self._done, 1)
            now = time.monotonic()
            if now - self._last >= EVERY and share >= self._said + STEP:
                self._last, self._said = now, share
                rate = self._done / (now - self._began)
                left = max(self._total - self._done, 0) / rate
                self._say(f"{share:.0%}, {size(rate)}/s, {left:.0f} s left")

    def close(self) -> None:
        """Say nothing more."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def watcher() -> Bar | Lines:
    """Return a bar on a terminal, lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()
