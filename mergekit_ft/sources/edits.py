"""Changes to a config.json, by dotted key."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def with_edits(config: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other values; None leaves a key out."""
    found = copy.deepcopy(dict(config))
    for dotted, value in edits.items():
        *outer, key = dotted.split(".")
        part = found
        for step in outer:
            part = part.setdefault(step, {})
        if value is None:
            part.pop(key, None)
        else:
            part[key] = value
    return found
