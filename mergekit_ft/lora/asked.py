"""How an adapter is to be extracted or merged; what cannot be meant is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mergekit_ft.algebra import spectra
from mergekit_ft.errors import PlanError
from mergekit_ft.lora import core

Svd = Literal["auto", "exact", "randomised"]


@dataclass(frozen=True)
class ExtractAsked:
    """How an adapter is to be extracted."""

    rank: int | None = None  # of each matrix; with `energy`, at most
    energy: float | None = None  # share of each matrix's squared norm to keep, in (0, 1]
    svd: Svd = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    others: Literal["save", "skip", "refuse"] = "save"  # what is changed and is no matrix
    seed: int = 0  # of the sketches
    memory: int = 4 << 30  # bytes
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise PlanError("say how large the adapter may be: --rank 16, or --energy 0.95")
        spectra.require_cut(self.rank, self.energy)
        if self.svd == "randomised" and self.rank is None:
            raise PlanError("--svd randomised needs --rank: a sketch has a size")

    def words(self) -> list[str]:
        """Return what was asked for, as on the command line."""
        given: list[tuple[str, Any]] = [("rank", self.rank), ("energy", self.energy)]
        given += [("include", glob) for glob in self.include]
        given += [("exclude", glob) for glob in self.exclude]
        named = [f"--{word} {value}" for word, value in given if value is not None]
        usual = ExtractAsked(rank=1)
        more = [(word, getattr(self, word)) for word in ("svd", "others", "seed")]
        return named + [f"--{w} {v}" for w, v in more if v != getattr(usual, w)]

    def kept(self) -> dict[str, Any]:
        """Return what a byte of the adapter depends on."""
        names = ("rank", "energy", "svd", "include", "exclude", "others", "seed")
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class MergeAsked:
    """How adapters are to be merged."""

    method: Literal["concat", "svd", "core", "knots"] = "concat"
    weights: Sequence[float] = ()  # one for all, or one each; none: 1
    rank: int | None = None
    energy: float | None = None
    operator: str | None = None  # of `core` and `knots`
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the operator
    own: Sequence[Mapping[str, Any]] = ()  # parameters of each adapter; none: the same for all
    then: Sequence[Any] = ()  # operators after it
    others: Literal["refuse", "skip"] = "refuse"  # tensors held whole that cannot be carried over
    memory: int = 4 << 30  # bytes
    overwrite: bool = False

    def __post_init__(self) -> None:
        cut = self.rank is not None or self.energy is not None
        if self.method == "concat" and cut:
            raise PlanError(
                "concat is the whole sum and cuts nothing: --method svd takes --rank and --energy"
            )
        if self.method == "svd" and not cut:
            raise PlanError("--method svd needs --rank or --energy: where to cut")
        if self.space is None and (self.operator or self.parameters or self.own or self.then):
            raise PlanError("operators and their parameters are for --method core or knots")
        if self.space is not None:
            core.require_operator(self.operator)
        spectra.require_cut(self.rank, self.energy)

    @property
    def space(self) -> core.Space | None:
        """Return where an operator merges; None where deltas are added up."""
        return self.method if self.method == "core" or self.method == "knots" else None

    def plan(self) -> dict[str, Any]:
        """Return the words of the operator's plan."""
        words = {"merge_method": self.operator, "parameters": dict(self.parameters)}
        return words | ({"then": list(self.then)} if self.then else {})

    def parameters_of_each(self, count: int) -> list[dict[str, Any]]:
        """Return each adapter's own parameters, its weight among them where one is wanted."""
        own = [dict(parameters) for parameters in self.own] or [{} for _ in range(count)]
        given = list(self.weights) * (count if len(self.weights) == 1 else 1)
        said = "weight" in self.parameters or any("weight" in words for words in own)
        if not given and not said and core.needs_weight(str(self.operator)):
            given = [1.0] * count
        for words, weight in zip(own, given, strict=False):
            words["weight"] = weight
        return own

    def kept(self) -> dict[str, Any]:
        """Return what a byte of the adapter depends on."""
        names = ("method", "rank", "energy", "operator", "parameters", "others")
        lists = {name: list(getattr(self, name)) for name in ("weights", "own", "then")}
        return {**{name: getattr(self, name) for name in names}, **lists}

    def words(self) -> list[str]:
        """Return what was asked for, as on the command line."""
        named: list[tuple[str, Any]] = [("method", self.method), ("operator", self.operator)]
        named += [("rank", self.rank), ("energy", self.energy)]
        given = [f"--{word} {value}" for word, value in named if value is not None]
        return given + [f"--set {key}={value}" for key, value in self.parameters.items()]
