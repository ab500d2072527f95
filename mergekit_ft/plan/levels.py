"""Where each parameter's values come from: a model's own entry, the whole plan, the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_ft.plan.fields import REQUIRED, Parameter, listed, parameters_of
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.models import Plan
from mergekit_ft.plan.parts import Part
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.references import ModelReference
from mergekit_ft.plan.settings import Clause, Setting, read_setting
from mergekit_ft.registry import did_you_mean

if TYPE_CHECKING:
    from mergekit_ft.contract import Operator


@dataclass(frozen=True)
class Member:
    """One of the k models that are merged."""

    model: ModelReference
    path: Keys  # of its entry: ("models", 0), or ("base_model",) where it is not listed
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The settings that one model's value may come from, the nearest level first."""

    whose: str  # " for ./maths", or " of slerp" where all models share
    path: Keys
    chain: tuple[Setting, ...]

    @property
    def broken(self) -> bool:
        """Say whether a fault took a value away."""
        return any(setting.broken for setting in self.chain)

    def pick(self, holds: dict[Clause, bool]) -> Clause | None:
        """Return the first clause that holds."""
        clauses = (clause for setting in self.chain for clause in setting.clauses)
        return next((clause for clause in clauses if holds[clause]), None)


@dataclass(frozen=True)
class Table:
    """A parameter and its rows: k of them, or one that all models share."""

    parameter: Parameter
    rows: tuple[Row, ...]


def members(part: Part, method: type[Operator]) -> list[Member]:
    """Return the k models in order, the base among them where it is not apart.

    A base that is not listed joins whole models last; to an output slice nothing is added.
    """
    from mergekit_ft.contract import Base

    apart = method.base is not Base.IGNORED
    base = part.base
    items = enumerate(part.items)
    listed = [Member(item.model, (*part.path, i), item.parameters) for i, item in items]
    if base is None:
        return listed
    others = [member for member in listed if member.model.key != base.key]
    if apart:
        return others
    joins = len(others) == len(listed) and not part.sliced
    return [*listed, Member(base, part.base_path, {})] if joins else listed


class Levels:
    """Read every setting of one method, reporting what is unknown, misplaced or missing."""

    def __init__(
        self,
        reading: Reading,
        method: type[Operator],
        part: Part,
        rows: list[Member],
        step: int | None,
        read: dict[Keys, Setting],
    ) -> None:
        assert reading.plan is not None
        self.reading, self.plan, self.part = reading, reading.plan, part
        self.step, self.members = step, rows
        self._read = read  # by all parts of the plan, each setting once
        self.name = self.plan.merge_method if step is None else self.plan.then[step].method
        self.known = parameters_of(method)
        self.takes = listed(method, self.name)
        self.without_effect = method.without_effect
        self.settings: dict[Keys, Setting] = {}
        self._refuse_unknown()
        if step is None:
            self._refuse_misplaced()
        self.tables = [self._table(parameter) for parameter in self.known.values()]

    @property
    def levels(self) -> tuple[tuple[Keys, Mapping[str, Any]], ...]:
        """Return the settings that all models share, the nearest first, by their paths."""
        if self.step is None:
            return self.part.levels
        return ((self.where, self.plan.then[self.step].parameters),)

    @property
    def where(self) -> Keys:
        """Return the path of the method's name."""
        return ("merge_method",) if self.step is None else ("then", self.step, self.name)

    def remedy(self, parameter: Parameter, row: Row) -> str:
        """Say where a missing parameter can be written."""
        if self.step is not None:
            return f"write `- {self.name}: {{{parameter.word}: VALUE}}`"
        if row.path == self.part.base_path:
            return "a base_model that is not listed joins the models last: list it with its own"
        where = "its `parameters:` or " if parameter.scope == "model" else ""
        return f"write it under {where}the top-level `parameters:`"

    def _refuse_unknown(self) -> None:
        for path, given in self.levels:
            for word in given:
                known = self._refuse_word(word, (*path, word))
                if known and known.scope == "plan" and self.step is None and len(path) > 1:
                    message = f"'{word}' has one value for the whole plan; move it to the top-level"
                    self.reading.add((*path, word), f"{message} `parameters:`", key=True)

    def _refuse_misplaced(self) -> None:
        """Report parameters under a model that the method does not look for there."""
        mine = {member.path: member for member in self.members}
        for i, entry in enumerate(self.part.items):
            path: Keys = (*self.part.path, i, "parameters")
            if path[:-1] not in mine and entry.parameters:
                message = f"parameters of the base model have no effect in {self.name}; remove them"
                self.reading.add(path, message, key=True, aside=path)
                continue
            for word in entry.parameters:
                known = self._refuse_word(word, (*path, word))
                if known and known.scope != "model":
                    message = f"'{word}' is one value for all models, without effect under one"
                    where = "the slice's" if self.part.sliced else "the top-level"
                    message += f"; move it to {where} `parameters:`"
                    self.reading.add((*path, word), message, key=True, aside=(*path, word))

    def _refuse_word(self, word: str, path: Keys) -> Parameter | None:
        if word in self.known:
            return self.known[word]
        aside = path if self.step is None else None  # mergekit has no `then:`
        if word in self.without_effect:
            message = f"'{word}' has no effect in {self.name}: {self.without_effect[word]}"
            self.reading.add(path, f"{message}; remove it", key=True, aside=aside)
            return None
        if word in Plan.model_fields and word != "name":
            hint = "; it belongs at the top level of the plan"
        else:
            hint = did_you_mean(word, self.known)
        where = "parameters" if self.step is None else self.name
        message = f"unknown key '{word}' under {where}{hint} {self.takes}"
        self.reading.add(path, message, key=True, aside=aside)
        return None

    def _table(self, parameter: Parameter) -> Table:
        chains = (self._setting(parameter, given, path) for path, given in self.levels)
        top = tuple(setting for chain in chains for setting in chain)
        if parameter.scope == "model":
            table = Table(parameter, tuple(self._row(parameter, m, top) for m in self.members))
        else:
            table = Table(parameter, (Row(f" of {self.name}", self.where, top),))
        for row in table.rows:
            if not row.chain and parameter.default is REQUIRED and not self._was_torn(row):
                message = f"missing required parameter '{parameter.word}'{row.whose}"
                self.reading.add(row.path, f"{message}; {self.remedy(parameter, row)}")
        return table

    def _row(self, parameter: Parameter, member: Member, top: tuple[Setting, ...]) -> Row:
        own: tuple[Setting, ...] = ()
        if self.step is None:
            own = self._setting(parameter, member.parameters, (*member.path, "parameters"))
        return Row(f" for {member.model}", member.path, own + top)

    def _setting(
        self, parameter: Parameter, given: Mapping[str, Any], path: Keys
    ) -> tuple[Setting, ...]:
        """Return the setting at one level, or nothing."""
        if parameter.word not in given:
            return ()
        path = (*path, parameter.word)
        if path not in self._read:
            raw = given[parameter.word]
            self._read[path] = read_setting(raw, parameter, path, self.reading)
        self.settings[path] = self._read[path]
        return (self.settings[path],)

    def _was_torn(self, row: Row) -> bool:
        """Say whether a fault took away the mapping where a value may have stood."""
        paths = [(*row.path, "parameters"), *(path for path, _ in self.levels)]
        return not self.reading.torn.isdisjoint(map(self.reading.marks.label, paths))
