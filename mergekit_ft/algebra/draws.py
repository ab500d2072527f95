"""Draws of names, keyed by seed and name: a name more or less moves no other's luck."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def drawn(names: Iterable[str], count: int, *key: object) -> list[str]:
    """Return so many of these names, by a draw that depends on the key and on each name alone."""

    def luck(name: str) -> bytes:
        return hashlib.sha256("\0".join([*map(str, key), name]).encode()).digest()

    return sorted(names, key=luck)[:count]
