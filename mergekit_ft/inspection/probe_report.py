"""What a probe found, as a page: a map of layers and modules, histograms, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_ft.inspection.probing import Probed
from mergekit_ft.looking import Finding, Seen
from mergekit_ft.reports import Column, HeatMap, Histograms, Measure, Notes, Panel, Report, Table

BINS = 10  # of a histogram of cosines
Values = list[list[float | None]]


def report(found: Probed) -> Report:
    """Return the page of what was found."""
    facts = [("base", found.models[0]), *(("against", model) for model in found.models[1:])]
    facts += [(key, str(value)) for key, value in found.parameters.items()]
    return Report(
        found.name.replace("_", " ").capitalize(),
        facts=tuple(facts),
        summary=tuple(_summary(found)),
        parts=tuple(_parts(found)),
    )


def heat_map(found: Probed) -> HeatMap | None:
    """Return the map of layers and modules; None where no tensor is in a layer."""
    inside = [(seen, f) for seen, f in found.findings if seen.place.layer is not None]
    if not inside:
        return None
    rows = list(dict.fromkeys(_module(seen) for seen, _ in inside))
    layers = sorted({seen.place.layer for seen, _ in inside if seen.place.layer is not None})
    held = {(_module(seen), seen.place.layer): finding for seen, finding in inside}
    measures = [
        Measure(
            name.replace("_", " "),
            [[_value(held.get((row, layer)), name) for layer in layers] for row in rows],
        )
        for name in found.columns
    ]
    first = f"{found.unit or found.columns[0]}, by layer and module"
    return HeatMap(first, rows, [str(layer) for layer in layers], measures)


def _module(seen: Seen) -> str:
    """Return a tensor's name within its layer; of several stacks with the stack's."""
    within = seen.name.removeprefix(f"{seen.place.stack}.{seen.place.layer}.")
    within = within.removesuffix(".weight")
    return within if seen.place.stack in ("model.layers", "") else f"{seen.place.stack} {within}"


def _value(finding: Finding | None, name: str) -> float | None:
    return None if finding is None else float(finding[name])


def _summary(found: Probed) -> Iterator[str]:
    plain = {k: v for k, v in found.conclusion.items() if not isinstance(v, list)}
    if plain:
        yield "; ".join(f"{key.replace('_', ' ')}: {value:,}" for key, value in plain.items())
    yield f"{len(found.findings)} tensors were looked at, {found.left} were not."


def _parts(found: Probed) -> Iterator[Any]:
    mapped = heat_map(found)
    if mapped is not None:
        yield mapped
    panels = list(_panels(found.findings))
    if panels:
        edges = [f"{i / BINS:.1f}" for i in range(BINS)]
        yield Histograms(
            "Nearest direction of the base",
            edges,
            panels,
            axis="largest cosine with a singular vector of the base, from",
            of="singular vectors",
            first_large=False,
        )
    for key, value in found.conclusion.items():
        if isinstance(value, list) and value:
            yield _table(key.replace("_", " ").capitalize(), value)
    yield _table(
        "Tensors",
        [{"tensor": s.name, **{c: f[c] for c in found.columns}} for s, f in found.findings],
    )
    if found.modules:
        yield Notes("Modules named", found.modules)


def _panels(findings: Sequence[tuple[Seen, Finding]]) -> Iterator[Panel]:
    """Yield the cosines of each module over its layers, where a probe has them."""
    held: dict[str, list[float]] = {}
    for seen, finding in findings:
        for matrix in finding.get("matrices", ()):
            held.setdefault(_module(seen), []).extend(matrix["nearest"])
    for module, cosines in held.items():
        counts = [0.0] * BINS
        for cosine in cosines:
            counts[min(BINS - 1, int(cosine * BINS))] += 1.0
        yield Panel(module, counts)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(rows[0])
    columns = [
        Column(name.replace("_", " "), number=not isinstance(rows[0][name], str)) for name in names
    ]
    return Table(title, columns, [[row[name] for name in names] for row in rows])
