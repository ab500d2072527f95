"""What differs between two checkpoints: from headers, and where asked from every weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mergekit_ft.errors import PlanError
from mergekit_ft.inspection.differences import Rows, differences
from mergekit_ft.inspection.sameness import Verdict, known
from mergekit_ft.layers import Place, family, places
from mergekit_ft.options import Options, Progress, Unwatched
from mergekit_ft.registry import nearest
from mergekit_ft.resolution import Ref
from mergekit_ft.resolution.opening import open_model
from mergekit_ft.sources import Source

if TYPE_CHECKING:
    from mergekit_ft.inspection.comparison import Both, Totals

Group = tuple[str, str, int | None]  # stack, module family, layer
MEASURES = ("relative_norm", "cosine", "changed_share", "sign_agreement", "largest")


@dataclass(frozen=True)
class Asked:
    """What is looked at."""

    stats: bool = False  # read the weights
    include: tuple[str, ...] = ()  # globs of names; none: every tensor
    exclude: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()  # parts that do not count as different, and are not told


@dataclass(frozen=True)
class Line:
    """One tensor that was compared."""

    name: str
    place: Place
    family: str
    dtype: str  # of A, with that of B where it is another
    shape: tuple[int, ...]
    totals: Totals


@dataclass
class Diff:
    """What was found."""

    a: str
    b: str
    tensors: tuple[int, int]  # of each that are looked at
    matches: Mapping[str, int]  # how many tensors each glob matches
    headers: Mapping[str, Rows]  # differences by part
    weights: Verdict
    how: str  # that is known
    lines: list[Line] = field(default_factory=list)  # of tensors whose weights were read
    unread: list[str] = field(default_factory=list)  # tensors of both that cannot be compared
    notes: list[str] = field(default_factory=list)
    stats: bool = False

    @property
    def different(self) -> bool:
        """Say whether anything that was looked at differs."""
        return any(map(_counts, self.headers.values())) or self.weights == "different"

    def groups(self) -> dict[Group, Totals]:
        """Return the totals by stack, module family and layer."""
        return _grouped((_group(line, line.place.layer), line.totals) for line in self.lines)

    def families(self) -> dict[Group, Totals]:
        """Return the totals by stack and module family, all layers together."""
        return _grouped((_group(line, None), line.totals) for line in self.lines)

    def total(self) -> Totals:
        """Return the totals of all that was read."""
        from mergekit_ft.inspection.comparison import added_up

        return added_up(line.totals for line in self.lines)


def _group(line: Line, layer: int | None) -> Group:
    return line.place.stack, line.family, layer


def _grouped(parts: Iterable[tuple[Group, Totals]]) -> dict[Group, Totals]:
    """Return what the totals of each group come to."""
    from mergekit_ft.inspection.comparison import added_up

    held: dict[Group, list[Totals]] = {}
    for group, totals in parts:
        held.setdefault(group, []).append(totals)
    return {group: added_up(several) for group, several in held.items()}


def _counts(rows: Rows) -> bool:
    """Say whether a part differs; a side file that was not fetched is told, and does not count."""
    return any(not row.get("unread") for row in rows)


def diff(
    a: str,
    b: str,
    asked: Asked | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Diff:
    """Compare two checkpoints, named as a plan names them; options are fields of `Options`."""
    asked, chosen = asked or Asked(), Options(**options)
    opening: dict[str, Any] = {"offline": chosen.offline, "allow_pickle": chosen.allow_pickle}
    opening |= {"headers_only": not asked.stats}
    with open_model(a, **opening) as first, open_model(b, **opening) as second:
        return between(first, second, asked, chosen, progress or Unwatched())


def between(a: Source, b: Source, asked: Asked, options: Options, watcher: Progress) -> Diff:
    """Compare two opened checkpoints."""
    matches = _matches(a, b, asked)
    names = [name for name in dict.fromkeys([*a, *b]) if _chosen(name, asked)]
    if not names:
        raise PlanError("--exclude leaves no tensor of those that --include chooses")
    found = {
        part: rows
        for part, rows in differences(a, b, set(names)).items()
        if part not in asked.ignore
    }
    verdict, how = known(a, b)
    if verdict == "different" and len(names) < len({*a, *b}):
        verdict, how = "unknown", ""  # the difference may lie in what is left out
    counts = (sum(n in a for n in names), sum(n in b for n in names))
    made = Diff(str(a), str(b), counts, matches, found, verdict, how)
    made.notes += [f"{source.reference}: {note}" for source in (a, b) for note in source.notes]
    if asked.stats:
        _read(made, a, b, names, options, watcher)
    return made


def _matches(a: Source, b: Source, asked: Asked) -> dict[str, int]:
    """Return how many tensors each glob matches; one that matches none is a fault."""
    names, found, faults = list(dict.fromkeys([*a, *b])), {}, []
    for option, globs in (("--include", asked.include), ("--exclude", asked.exclude)):
        for glob in globs:
            found[f"{option} {glob}"] = hits = sum(fnmatchcase(name, glob) for name in names)
            if not hits:
                near = nearest(glob.replace("*", ""), names) or names[:3]
                faults.append(f"{option} {glob!r} matches no tensor; near: {', '.join(near)}")
    if faults:
        raise PlanError("\n".join(faults))
    return found


def _chosen(name: str, asked: Asked) -> bool:
    included = not asked.include or any(fnmatchcase(name, glob) for glob in asked.include)
    return included and not any(fnmatchcase(name, glob) for glob in asked.exclude)


def _read(
    made: Diff, a: Source, b: Source, names: Sequence[str], options: Options, watcher: Progress
) -> None:
    """Compare the weights of all that both have, and say of what that cannot be done."""
    from mergekit_ft.inspection.comparison import compared

    pairs, made.unread = _pairs(a, b, names)
    totals = compared(pairs, options, watcher)
    at = places({**a, **b})
    made.lines = [_line(pair, at[pair.name], totals[pair.name]) for pair in pairs]
    made.stats = True
    changed = any(line.totals.changed for line in made.lines)
    made.weights = "different" if changed else "equal"
    but = f", but for {len(made.unread):,} tensors" if made.unread else ""
    made.how = f"every weight was read{but}"
    other = sum("/" in line.dtype for line in made.lines)
    if other:
        made.notes.append(
            f"{other} tensors have two dtypes: what differs are values, and steps (ULP) are those "
            "of the coarser dtype, after rounding to it"
        )
    odd = sum(map(sum, (line.totals.odd for line in made.lines)))
    if odd:
        made.notes.append(
            f"{odd:,} values are NaN or Inf (counted tensor by tensor): norms, cosines, signs and "
            "steps are of the elements that are finite in both"
        )


def _pairs(a: Source, b: Source, names: Sequence[str]) -> tuple[list[Both], list[str]]:
    """Return what can be compared, and what cannot; what only ties reach is there once."""
    from mergekit_ft.inspection.comparison import Both
    from mergekit_ft.sources.dtypes import FLOATING

    pairs, unread = [], []
    for name in names:
        here, there = a.locate(name), b.locate(name)
        if here is None or there is None:
            unread.append(name)
            continue
        one, other = Ref(a, here, a[here]), Ref(b, there, b[there])
        kinds = {one.info.dtype, other.info.dtype}
        if one.info.shape != other.info.shape or (len(kinds) > 1 and not kinds <= FLOATING):
            unread.append(name)
        else:
            pairs.append(Both(name, one, other))
    return pairs, unread


def _line(pair: Both, place: Place, totals: Totals) -> Line:
    kinds = dict.fromkeys((pair.a.info.dtype, pair.b.info.dtype))
    shape = pair.a.info.shape
    return Line(pair.name, place, family(pair.name, place), "/".join(kinds), shape, totals)


def ranked(lines: Sequence[Line], by: str) -> list[Line]:
    """Return tensors, those that differ most first; equal ones keep the order of the file."""
    if by == "name":
        return list(lines)
    sign = 1 if by in ("cosine", "sign_agreement") else -1

    def key(line: Line) -> float:
        value = getattr(line.totals, by)
        return math.inf if value is None else sign * float(value)

    return sorted(lines, key=key)


def report(made: Diff, lines: Sequence[Line]) -> dict[str, Any]:
    """Return all of it as JSON can hold it, with these of the tensors."""
    found: dict[str, Any] = {
        "a": made.a,
        "b": made.b,
        "different": made.different,
        "tensors": {"a": made.tensors[0], "b": made.tensors[1]},
        "selectors": dict(made.matches),
        "headers": dict(made.headers),
        "weights": {"verdict": made.weights, "how": made.how, "read": made.stats},
        "notes": made.notes,
    }
    return found | (_stats(made, lines) if made.stats else {})


def _stats(made: Diff, lines: Sequence[Line]) -> dict[str, Any]:
    groups = [
        {"stack": stack, "family": name, "layer": layer, **measures(totals)}
        for (stack, name, layer), totals in made.groups().items()
    ]
    families = [
        {"stack": stack, "family": name, **measures(totals)}
        for (stack, name, _), totals in made.families().items()
    ]
    rows = [
        {"name": line.name, "dtype": line.dtype, "shape": list(line.shape), **measures(line.totals)}
        for line in lines
    ]
    stats = {"total": measures(made.total()), "families": families, "groups": groups}
    return {"stats": stats | {"tensors": rows, "not_compared": made.unread}}


def measures(totals: Totals) -> dict[str, Any]:
    """Return what totals say, by name."""
    from mergekit_ft.algebra.distances import edges

    steps = [(*edges(place), int(count)) for place, count in enumerate(totals.bins) if count]
    names = ("nan_a", "inf_a", "nan_b", "inf_b")
    return {
        "elements": totals.numel,
        "changed": totals.changed,
        **{name: getattr(totals, name) for name in MEASURES},
        "ulp": [{"from": least, "to": most, "count": count} for least, most, count in steps],
        **dict(zip(names, totals.odd, strict=True)),
    }
