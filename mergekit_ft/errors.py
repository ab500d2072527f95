"""Every error a user can meet, each with its exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


class MergekitError(Exception):
    """What, where, and what would do, in one message."""

    exit_code = 1


@dataclass(frozen=True)
class Fault:
    """One fault of a plan and the place in its text."""

    message: str
    file: str = "plan"  # "": said of no file
    line: int = 0  # from 1; 0: no place in the text
    column: int = 0  # from 1
    kind: str = "plan"  # "plan" or "source": decides the exit code of a report
    aside: str = field(default="", compare=False)  # label of what mergekit reads without effect

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.message}" if place else self.message


class PlanError(MergekitError):
    """A plan that cannot be carried out; holds every fault found, in the order of the text."""

    exit_code = 3

    def __init__(self, faults: Iterable[Fault] | str) -> None:
        found = [Fault(faults, file="")] if isinstance(faults, str) else list(faults)
        self.faults = sorted(found, key=lambda fault: (fault.line, fault.column))
        super().__init__("\n".join(map(str, self.faults)))


class SourceError(MergekitError):
    """A checkpoint that cannot be read, or does not fit the others."""

    exit_code = 4


class OperatorError(MergekitError):
    """A method that met values it cannot merge (NaN, Inf, a contradiction between parameters)."""

    exit_code = 5


class WriteError(MergekitError):
    """An output that cannot be written."""

    exit_code = 6
