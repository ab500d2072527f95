"""A plan as it was read: its models, its faults, and the place of each of its words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergekit_ft.errors import Fault, PlanError
from mergekit_ft.plan.marks import Keys, Marks
from mergekit_ft.plan.models import Plan
from mergekit_ft.plan.references import Key

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
    lookups: list[Lookup] = field(default_factory=list)  # the parameters of each part, when the
    # method is known
    lenient: bool = False  # words that mergekit reads without effect are remarks, not faults
    remarks: list[Fault] = field(default_factory=list)  # of what was set aside so
    unfit: set[Key] = field(default_factory=set)  # keys of models of which it
    # was said that they do not fit
    stages: dict[str, Reading] = field(default_factory=dict)  # the plan's other documents, by name

    @property
    def lookup(self) -> Lookup | None:
        """Return the parameters of the first part, the only one where whole models merge."""
        return self.lookups[0] if self.lookups else None

    def fault(
        self,
        path: Keys,
        message: str,
        *,
        key: bool = False,
        kind: str = "plan",
        aside: Keys | None = None,
    ) -> Fault:
        """Return a fault placed at the value of a path, or at its key.

        `aside` is the path of what mergekit 0.1.5 reads without effect: the plan means the same
        without it. Only what the rest of the reading does without may be given.
        """
        mark, label = self.marks.nearest(path), self.marks.label(aside) if aside else ""
        if not mark.line:
            around = self.marks.label(path)
            return Fault(
                f"{around}: {message}" if around else message, self.file, kind=kind, aside=label
            )
        line, column = (mark.key_line, mark.key_column) if key else (mark.line, mark.column)
        return Fault(message, self.file, line, column, kind, label)

    def add(
        self,
        path: Keys,
        message: str,
        *,
        key: bool = False,
        kind: str = "plan",
        aside: Keys | None = None,
    ) -> None:
        """Add a fault to the report, once."""
        self.take([self.fault(path, message, key=key, kind=kind, aside=aside)])

    def take(self, faults: Iterable[Fault]) -> None:
        """Add faults to the report, each once; a lenient reading remarks on what it sets aside."""
        for fault in faults:
            report = self.remarks if self.lenient and fault.aside else self.faults
            if fault not in report:
                report.append(fault)

    def told(self) -> list[str]:
        """Return the remarks as notes: no file's name, so that a plan's copy has the same."""
        return [str(replace(remark, file="plan")) + " (set aside)" for remark in self.remarks]

    def accepted(self) -> Plan:
        """Return the plan, or raise every fault found in it."""
        if self.faults or self.plan is None:
            raise PlanError(self.faults or "the plan holds nothing that can be used")
        return self.plan
