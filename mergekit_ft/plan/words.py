"""Refusals of a plan in our own words."""

from __future__ import annotations

from typing import NoReturn

from pydantic_core import PydanticCustomError


def refuse(message: str, at: tuple[str | int, ...] = (), *, aside: bool = False) -> NoReturn:
    """Refuse a value of a plan in our own words; `at` is the path below it.

    `aside` says that mergekit 0.1.5 reads it without effect, so that only it is set aside.
    """
    details = {"message": message, "at": at, "aside": aside}
    raise PydanticCustomError("plan", "{message}", details)
