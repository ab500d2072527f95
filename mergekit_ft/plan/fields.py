"""Which parameters a method takes, and what each accepts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergekit_ft.registry import did_you_mean

if TYPE_CHECKING:
    from mergekit_ft.contract import Operator

Scope = Literal["model", "tensor", "plan"]
REQUIRED: Any = object()  # the default of a parameter that has none


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as a plan spells it."""

    word: str
    field: str
    scope: Scope
    default: Any  # of one model, where the scope is a model
    kind: TypeAdapter[Any]  # of one value
    takes_bool: bool
    description: str

    def value(self, raw: Any) -> Any:
        """Return a scalar of the plan as the method's type; ValueError says what is wrong."""
        if isinstance(raw, bool) and not self.takes_bool:
            raise ValueError(f"{self.word} must be {self._wanted(0.5)}; got {shown(raw)}")
        try:
            value = self.kind.validate_python(raw)
        except ValidationError as error:
            raise ValueError(self._told(raw, error)) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self.word} must be finite; got {shown(raw)}")
        return value

    def _wanted(self, raw: Any) -> str:
        """Return in words what the type accepts, learnt from refusing a value."""
        try:
            self.kind.validate_python(object())
        except ValidationError as error:
            return " or ".join(dict.fromkeys(map(accepted, error.errors())))
        return "another value"

    def _told(self, raw: Any, error: ValidationError) -> str:
        errors = error.errors()
        said = [str(e["ctx"]["error"]) for e in errors if e["type"] == "value_error"]
        if said:
            return f"{self.word}: {said[0]}"
        wanted = list(dict.fromkeys(map(accepted, errors)))
        words = re.findall(r"'([^']+)'", " ".join(wanted))
        hint = did_you_mean(raw, words) if isinstance(raw, str) else ""
        return f"{self.word} must be {' or '.join(wanted)}; got {shown(raw)}{hint}"


@cache
def parameters_of(method: type[Operator]) -> dict[str, Parameter]:
    """Return a method's parameters by the word that a plan uses."""
    found = [_parameter(name, field) for name, field in method.model_fields.items()]
    return {parameter.word: parameter for parameter in found}


def listed(method: type[Operator], name: str) -> str:
    """Return "(ties takes: weight, density)"."""
    return f"({name} takes: {', '.join(parameters_of(method)) or 'none'})"


def shown(raw: Any) -> str:
    """Return a value as a plan would spell it, short."""
    if raw is None:
        return "nothing"
    if isinstance(raw, dict | list):
        return "a mapping" if isinstance(raw, dict) else "a list"
    if isinstance(raw, bool):
        return str(raw).lower()
    return repr(raw if not isinstance(raw, str) or len(raw) < 60 else raw[:57] + "...")


def _parameter(name: str, field: FieldInfo) -> Parameter:
    extra = field.json_schema_extra
    scope = cast(Scope, extra.get("scope", "tensor") if isinstance(extra, dict) else "tensor")
    kind: Any = field.annotation
    default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
    if scope == "model":
        kind = get_args(kind)[0]
        default = default[0] if isinstance(default, tuple) and default else default
    adapter = TypeAdapter(Annotated[(kind, *field.metadata)] if field.metadata else kind)
    word = field.alias or name
    return Parameter(
        word, name, scope, default, adapter, _takes_bool(adapter), field.description or ""
    )


def _takes_bool(kind: TypeAdapter[Any]) -> bool:
    try:
        return isinstance(kind.validate_python(True, strict=True), bool)
    except ValidationError:
        return False


_KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "none": "nothing",
    "finite": "finite",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def accepted(error: ErrorDetails) -> str:
    """Return what would have been accepted where pydantic refused."""
    kind, details = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {details[key]:g}"
    if kind in ("literal_error", "enum"):
        return str(details["expected"])
    return _KINDS.get(kind.partition("_")[0], error["msg"].lower())
