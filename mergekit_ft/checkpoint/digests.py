"""SHA-256 of files: while they are read or written beside, and remembered by size and times."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

CHUNK = 1 << 20  # bytes read at a time
SETTLED = 2.0  # seconds: a file touched later than this before hashing is not remembered


class Growing(Protocol):
    """A file that is being written."""

    size: int
    end: int  # how far it is written without a gap


class Cancelled(Exception):
    """The run ended before the file was hashed."""


class Following:
    """Hashes a file while it is written, in the threads of those who write it.

    They do it one at a time, and the others go on; so nothing is left to do at the end.
    """

    def __init__(self, path: Path, growth: Growing) -> None:
        self.path, self.growth = path, growth
        self._sha, self._position = hashlib.sha256(), 0
        self._turn = threading.Lock()

    def advance(self, start: int, data: memoryview) -> None:
        """Hash what is written without a gap, unless another thread is at it.

        `data` was just written from byte `start` on, and need not be read again.
        """
        if self._turn.acquire(blocking=False):
            try:
                self._catch_up(start, data)
            finally:
                self._turn.release()

    def result(self) -> str:
        """Return the digest of the whole file, in hexadecimal."""
        with self._turn:
            self._catch_up(self.growth.size, memoryview(b""))
        if self._position != self.growth.size:
            raise OSError(f"{self.path} ended at byte {self._position} of {self.growth.size}")
        return self._sha.hexdigest()

    def _catch_up(self, start: int, data: memoryview) -> None:
        if self._position == start:
            self._take(data)
        while self._position < (end := self.growth.end):
            stop = start if self._position < start < end else end
            self._read(stop)
            if self._position == start:
                self._take(data)

    def _take(self, data: memoryview) -> None:
        self._sha.update(data)
        self._position += len(data)

    def _read(self, stop: int) -> None:
        """Hash the file's bytes up to `stop`."""
        buffer = memoryview(bytearray(min(CHUNK, stop - self._position)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._position)
            while self._position < stop:
                got = file.readinto(buffer[: min(CHUNK, stop - self._position)])
                if not got:
                    raise OSError(f"{self.path} ended at byte {self._position}, before {stop}")
                self._take(buffer[:got])


class Digests:
    """Hashes files in the background; asking for a result waits for it."""

    def __init__(self, threads: int, memory: Path | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="digest")
        self._followed: dict[Path, Following] = {}
        self._memory = _Memory(memory or default_memory())
        self._futures: dict[Path, Future[str]] = {}
        self._cancelled = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, path: Path) -> None:
        """Begin to hash a file, unless that was asked before."""
        with self._lock:
            if path not in self._futures and not self._cancelled.is_set():
                self._futures[path] = self._pool.submit(self._remembered, path)

    def follow(self, path: Path, growth: Growing) -> Following:
        """Return what hashes a file while it is being written."""
        self._followed[path] = Following(path, growth)
        return self._followed[path]

    def of(self, path: Path) -> str:
        """Return the digest of a file in hexadecimal."""
        if path in self._followed:
            return self._followed[path].result()
        self.start(path)
        return self._futures[path].result()

    def close(self) -> None:
        """Stop what is under way."""
        with self._lock:
            self._cancelled.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._memory.save()

    def _remembered(self, path: Path) -> str:
        stamp = _stamp(path)
        digest = self._memory.recall(path, stamp)
        if digest is None:
            digest = self._digest(path)
            if _stamp(path) == stamp:
                self._memory.keep(path, stamp, digest)
        return digest

    def _digest(self, path: Path) -> str:
        sha, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                if self._cancelled.is_set():
                    raise Cancelled(str(path))
                sha.update(buffer[:got])
        return sha.hexdigest()


def default_memory() -> Path:
    """Return where digests are remembered."""
    return cache_folder() / "sha256.json"


def cache_folder() -> Path:
    """Return where things are remembered: $MERGEKIT_FT_CACHE, or ours of the user's cache."""
    root = os.environ.get("MERGEKIT_FT_CACHE")
    if root:
        return Path(root)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "mergekit-ft"


Stamp = list[int]  # device, inode, size, mtime and ctime in ns


def _stamp(path: Path) -> Stamp:
    at = path.stat()
    return [at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns]


class _Memory:
    """Digests by path; one is good while the file's stamp is what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _read(path)
        self._new: dict[str, tuple[Stamp, str]] = {}

    def recall(self, path: Path, stamp: Stamp) -> str | None:
        """Return the digest of a file that has not been touched since."""
        known = self._known.get(str(path.resolve()))
        return known[1] if known and known[0] == stamp else None

    def keep(self, path: Path, stamp: Stamp, digest: str) -> None:
        """Remember a digest, unless the file is so fresh that a change could go unseen."""
        if time.time_ns() - max(stamp[3:]) > SETTLED * 1e9:
            self._new[str(path.resolve())] = (stamp, digest)

    def save(self) -> None:
        """Add what is new to the file; where that cannot be done, nothing is lost but time."""
        if not self._new:
            return
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            known = {k: v for k, v in _read(self.path).items() if os.path.exists(k)}
            draft.write_text(json.dumps({**known, **self._new}), encoding="utf-8")
            draft.replace(self.path)
        except OSError:
            return


def _read(path: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
