"""The journal of a run: what is finished and durable, so that another run can go on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_ft.errors import WriteError

KINDS = {"identity", "finding", "tensor"}  # of entries


class Journal:
    """Lines of JSON; the first says whose run it is, each other what it finished."""

    def __init__(self, path: Path, identity: str) -> None:
        self.findings: dict[str, Any] = {}  # of surveys over the whole model
        self.changed: dict[str, bool] = {}  # by finished tensor: whether it differs from the base
        self.rounded: dict[str, list[float]] = {}  # by finished tensor: sums of what rounding left
        self._pending: list[dict[str, Any]] = []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_alone(self._descriptor, path.parent)
            self._begin(lines, identity, path.parent)
        except BaseException:
            self.close()
            raise

    def _begin(self, lines: Sequence[bytes], identity: str, folder: Path) -> None:
        entries = list(_entries(lines))
        os.ftruncate(self._descriptor, sum(map(len, lines[: len(entries)])))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if not entries:
            self._pending = [{"identity": identity}]
            self.flush()
        elif entries[0].get("identity") != identity:
            raise WriteError(
                f"{folder} belongs to another plan, or its sources or options have changed since; "
                "--overwrite without --resume starts again"
            )
        for entry in entries[1:]:
            if "finding" in entry:
                self.findings[entry["finding"]] = entry["value"]
            else:
                self.changed[entry["tensor"]] = entry["changed"]
                if "rounded" in entry:
                    self.rounded[entry["tensor"]] = entry["rounded"]

    def note_tensor(self, name: str, changed: bool, rounded: Sequence[float] | None = None) -> None:
        """Say that a tensor is whole."""
        self.changed[name] = changed
        entry = {"tensor": name, "changed": changed}
        if rounded is not None:
            entry["rounded"] = self.rounded[name] = list(rounded)
        self._pending.append(entry)

    def note_finding(self, key: str, finding: Any) -> None:
        """Say what a survey over the whole model found."""
        self.findings[key] = finding
        self._pending.append({"finding": key, "value": finding})

    def flush(self) -> None:
        """Make the notes durable; what they speak of must be so already."""
        text = "".join(json.dumps(entry) + "\n" for entry in self._pending)
        if text:
            os.write(self._descriptor, text.encode())
            os.fsync(self._descriptor)
        self._pending = []

    def close(self) -> None:
        """Let go of the file, and of the lock on it."""
        os.close(self._descriptor)


def _entries(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the entries up to the first that was not written whole."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not isinstance(entry, dict) or not entry.keys() & KINDS:
            return
        yield entry


def refuse_if_held(path: Path) -> None:
    """Refuse to go on where another run has this journal open."""
    if path.exists():
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock_alone(descriptor, path.parent)
        finally:
            os.close(descriptor)


def _lock_alone(descriptor: int, folder: Path) -> None:
    """Refuse to write where another run is writing, on systems that can tell."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise WriteError(
            f"{folder}: another run is writing there; wait for it or stop it"
        ) from error
