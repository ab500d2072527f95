"""A plan as it was read: its models, its faults, and the place of each of its words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergekit_ft.errors import Fault, PlanError
from mergekit_ft.plan.marks import Keys, Marks
from mergekit_ft.plan.models import Plan

if TYPE_CHECKING:
    from mergekit_ft.plan.parameters import Lookup


@dataclass
class Reading:
    """A plan, every fault found in it so far, and where its words stand."""

    plan: Plan | None
    faults: list[Fault]
    marks: Marks
    file: str = "plan"
    text: str = ""
    torn: set[str] = field(default_factory=set)  # labels of what was set aside as faulty
    lookup: Lookup | None = None  # the parameters, when the method is known

    def fault(self, path: Keys, message: str, *, key: bool = False, kind: str = "plan") -> Fault:
        """Return a fault placed at the value of a path, or at its key."""
        mark = self.marks.nearest(path)
        if not mark.line:
            around = self.marks.label(path)
            return Fault(f"{around}: {message}" if around else message, self.file, kind=kind)
        line, column = (mark.key_line, mark.key_column) if key else (mark.line, mark.column)
        return Fault(message, self.file, line, column, kind)

    def add(self, path: Keys, message: str, *, key: bool = False, kind: str = "plan") -> None:
        """Add a fault to the report, once."""
        fault = self.fault(path, message, key=key, kind=kind)
        if fault not in self.faults:
            self.faults.append(fault)

    def accepted(self) -> Plan:
        """Return the plan, or raise every fault found in it."""
        if self.faults or self.plan is None:
            raise PlanError(self.faults or "the plan holds nothing that can be used")
        return self.plan
