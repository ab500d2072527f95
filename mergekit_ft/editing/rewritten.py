"""What an editor changed, and what it must not have lost on the way into the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mergekit_ft.errors import OperatorError

LOST = 0.02  # share of the edits that rounding may lose


@dataclass(frozen=True)
class Rewritten:
    """What an editor changed."""

    held: dict[str, Tensor]  # by the checkpoint's names: host, the base's dtypes
    facts: dict[str, Any]  # for the receipt
    curve: list[dict[str, Any]] = field(default_factory=list)  # of what was trained
    notes: list[str] = field(default_factory=list)


def require_kept(exact: int, rounded: int, count: int, out: str) -> None:
    """Refuse what rounding lost: of `count` edits `exact` were said before it, `rounded` after."""
    if exact - rounded > max(1, LOST * count):
        raise OperatorError(
            f"rounding to the dtype of the base loses edits: {exact} of {count} were said, "
            f"{rounded} are; {out}"
        )
