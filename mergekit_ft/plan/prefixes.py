"""`prefix:` beside a model: how its tensors' names begin, and how they begin in the base."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

EXAMPLE = "`prefix: {model.: model.language_model.}`"


def _prefixes(raw: Any) -> Any:
    if raw is None:
        return None
    if not isinstance(raw, dict) or not raw:
        raise _refusal(f"prefix maps how names begin to how they begin in the base: {EXAMPLE}")
    for one, to in raw.items():
        if not isinstance(to, str):
            raise _refusal(f"prefix '{one}' must become text: {EXAMPLE}", (one,))
        if one == to:
            raise _refusal(f"prefix '{one}' becomes itself, which changes nothing", (one,))
    return raw


def _refusal(message: str, at: tuple[str, ...] = ()) -> PydanticCustomError:
    return PydanticCustomError("plan", "{message}", {"message": message, "at": at})


Prefixes = Annotated[dict[str, str] | None, BeforeValidator(_prefixes)]
