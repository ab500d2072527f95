"""What every parameter of a method is, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mergekit_ft.errors import Fault
from mergekit_ft.layers import Place
from mergekit_ft.plan.checks import adjustments
from mergekit_ft.plan.fields import REQUIRED
from mergekit_ft.plan.levels import Levels, Member, Row, Table, members
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.parts import Part, parts
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.references import ModelReference
from mergekit_ft.plan.settings import Clause, Gradient, Setting
from mergekit_ft.plan.unused import Seen, without_effect

if TYPE_CHECKING:
    from mergekit_ft.contract import Operator


@dataclass
class _Answer:
    """The values of all tensors for which the same clauses hold at the same depth."""

    values: dict[str, Any]
    complete: bool = True
    tried: bool = False
    operator: Operator | None = None


@dataclass
class Shared:
    """What the parts of a plan have in common, of one of its methods."""

    settings: dict[Keys, Setting] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)


Seat = tuple[str, Place]  # a tensor's name and where it stands


def lookups(reading: Reading, method: type[Operator]) -> list[Lookup]:
    """Return the parameters of each part of a plan, in the order of its parts."""
    assert reading.plan is not None
    steps = range(len(reading.plan.then))
    shared: dict[int | None, Shared] = {step: Shared() for step in (None, *steps)}
    return [Lookup(reading, method, part, shared) for part in parts(reading.plan)]


class Lookup:
    """The parameters of one method in one part of a plan, resolved for one tensor at a time."""

    def __init__(
        self,
        reading: Reading,
        method: type[Operator],
        part: Part,
        shared: Mapping[int | None, Shared],
    ) -> None:
        assert reading.plan is not None
        self._prepare(reading, method, part, members(part, method), None, shared[None])
        self._then: dict[int, Lookup] = {i: _Unknown() for i in range(len(reading.plan.then))}
        for i, adjustment in adjustments(reading).items():
            then = self._then[i] = Lookup.__new__(Lookup)
            then._prepare(reading, adjustment, part, self._members, i, shared[i])

    def _prepare(
        self,
        reading: Reading,
        method: type[Operator],
        part: Part,
        rows: list[Member],
        step: int | None,
        shared: Shared,
    ) -> None:
        self.method, self.part = method, part
        self._reading, self._members, self._shared = reading, rows, shared
        self._levels = Levels(reading, method, part, rows, step, shared.settings)
        self._clauses = [
            clause for setting in self._levels.settings.values() for clause in setting.clauses
        ]
        self._selective = [c for c in self._clauses if c.selector is not None]
        self._graded = any(isinstance(clause.value, Gradient) for clause in self._clauses)
        self._answers: dict[tuple[Any, ...], _Answer] = {}
        self._said: set[str] = set()
        self._missed: set[tuple[str, Keys]] = set()
        self._then = {}

    def members(self) -> list[ModelReference]:
        """Return the k models in order: the tuned ones, and the base where it is one of them."""
        return [member.model for member in self._members]

    def for_then(self, i: int) -> Lookup:
        """Return the parameters of the i-th operator under `then:`; none where it is unknown."""
        return self._then[i]

    def resolve(self, name: str, place: Place) -> dict[str, Any]:
        """Return the values by field name for one tensor; what is missing becomes a fault."""
        return dict(self._answer((name, place), (), place.depth).values)

    def operator(self, name: str, place: Place) -> Operator | None:
        """Return the method with its values for one tensor; like tensors share one instance."""
        return self.operator_at((name, place), (), place.depth)

    def operator_at(
        self, seat: Seat, inputs: Sequence[Seat], depth: float | None
    ) -> Operator | None:
        """Return the method for an output tensor at a depth of its own in its slice.

        `inputs` are the k tensors that it is merged from, by which each model's entries select;
        () where they have the output's name and place.
        """
        answer = self._answer(seat, inputs, depth)
        if answer.complete and not answer.tried:
            answer.tried = True
            answer.operator = self._built(answer.values, seat[0])
        return answer.operator

    def unused(self) -> list[Fault]:
        """Return a fault for each selector, entry and level that decided nothing in any part."""
        settings = self._shared.settings.values()
        found = without_effect(settings, self._shared.seen, self._reading)
        return found + [fault for then in self._then.values() for fault in then.unused()]

    def _answer(self, seat: Seat, inputs: Sequence[Seat], depth: float | None) -> _Answer:
        t, seats = depth or 0.0, (seat, *inputs)
        for one in seats:
            self._shared.seen.tensor(*one)
        hits = tuple([self._hits(*one) for one in seats])
        key = (hits, t if self._graded else 0.0)
        if key not in self._answers:
            self._answers[key] = self._resolved(seat[0], hits, t)
        return self._answers[key]

    def _hits(self, name: str, place: Place) -> tuple[bool, ...]:
        """Say which of the clauses that select are for a tensor."""
        return tuple([c.selector.matches(name, place) for c in self._selective if c.selector])

    def _resolved(self, name: str, hits: Sequence[tuple[bool, ...]], t: float) -> _Answer:
        everywhere = dict.fromkeys(self._clauses, True)
        holds = [everywhere | dict(zip(self._selective, some, strict=True)) for some in hits]
        answer = _Answer({})
        for table in self._levels.tables:
            own = holds[1:] if table.parameter.scope == "model" and holds[1:] else holds[:1]
            rows = zip(table.rows, own if len(own) > 1 else own * len(table.rows), strict=True)
            values = tuple([self._value(table, row, held, t, name) for row, held in rows])
            if REQUIRED in values:
                answer.complete = False
            else:
                shared = table.parameter.scope != "model"
                answer.values[table.parameter.field] = values[0] if shared else values
        return answer

    def _value(self, table: Table, row: Row, holds: dict[Clause, bool], t: float, name: str) -> Any:
        said = (clause for setting in row.chain for clause in setting.clauses)
        self._shared.seen.matched.update(clause for clause in said if holds[clause])
        clause = row.pick(holds)
        if clause is not None:
            self._shared.seen.decided.add(clause)
            return clause.value.at(t) if isinstance(clause.value, Gradient) else clause.value
        if table.parameter.default is REQUIRED:
            self._miss(table.parameter.word, row, name)
        return table.parameter.default

    def _miss(self, word: str, row: Row, name: str) -> None:
        """Report a parameter whose entries leave a tensor out, once for each model."""
        if row.broken or not row.chain or (word, row.path) in self._missed:
            return
        self._missed.add((word, row.path))
        message = f"missing required parameter '{word}'{row.whose} at {name}"
        message += "; add an entry without a filter, or a value for all models"
        self._reading.add(row.chain[0].path, message, key=True)

    def _built(self, values: dict[str, Any], name: str) -> Operator | None:
        try:
            return self.method(**values)
        except ValidationError as error:
            for details in error.errors():
                self._refuse(str(details.get("ctx", {}).get("error", details["msg"])), name)
            return None

    def _refuse(self, said: str, name: str) -> None:
        """Report once what a method says of values that contradict each other."""
        if said not in self._said:
            self._said.add(said)
            self._reading.add(self._levels.where, f"{self._levels.name} at {name}: {said}")


class _Unknown(Lookup):
    """An operator that cannot stand where it does, which was reported; it has no parameters."""

    def __init__(self) -> None:
        self._then = {}

    def resolve(self, name: str, place: Place) -> dict[str, Any]:
        return {}

    def operator_at(
        self, seat: Seat, inputs: Sequence[Seat], depth: float | None
    ) -> Operator | None:
        return None

    def unused(self) -> list[Fault]:
        return []
