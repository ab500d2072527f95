"""The command that looks at checkpoints with a probe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, settings
from mergekit_ft.cli.picturing import Pictures, pictures

if TYPE_CHECKING:
    from mergekit_ft.inspection.probing import Probed


@click.command()
@click.argument("name")
@click.argument("models", nargs=-1)
@click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help="A parameter, as its card lists it."
)
@click.option("--include", multiple=True, help="Look only at tensors that match this glob.")
@click.option("--exclude", multiple=True, help="Leave out tensors that match this glob.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Rows shown.")
@click.option("--write", type=click.Path(), help="Write the modules found to a file, one a line.")
@pictures
@click.option(
    "--memory", type=settings.SIZE, default="1GiB", show_default=True, help="Bytes for tensors."
)
@settings.offline
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def probe(
    name: str,
    models: tuple[str, ...],
    given: tuple[str, ...],
    top: int,
    write: str | None,
    report: str | None,
    plot: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Look at MODELS, the base first, with the probe NAME (or by its YAML plan)."""
    from mergekit_ft.inspection import probing

    files = Pictures(report, plot, overwrite)
    files.require_room()
    parameters = dict(_pair(item) for item in given)
    if name.endswith((".yaml", ".yml")):
        if models:
            raise click.UsageError("a plan names the models itself")
        name, named, words = probing.read_plan(name)
        models, parameters = tuple(named), {**words, **parameters}
    with printing.watched(quiet or as_json) as progress:
        found = probing.probe(name, models, parameters, progress=progress, **options)
    if write is not None:
        Path(write).write_text("".join(f"{module}\n" for module in found.modules))
    if files:
        _draw(files, found)
    if as_json:
        printing.json_of(found.report())
    elif not quiet:
        printing.lines(_lines(found, top))


def _draw(files: Pictures, found: Probed) -> None:
    """Write the page and the chart that were asked for."""
    from mergekit_ft.inspection import probe_report

    mapped = probe_report.heat_map(found)
    first = mapped.measures[0].name if mapped is not None else ""
    files.write(probe_report.report(found), mapped, first)


def _pair(item: str) -> tuple[str, Any]:
    import yaml

    key, sign, value = item.partition("=")
    if not sign or not key:
        raise click.UsageError(f"--set takes KEY=VALUE, not {item!r}")
    return key, yaml.safe_load(value)


def _lines(found: Probed, top: int) -> Iterator[str]:
    yield f"{found.name}: {' -> '.join(found.models)}"
    for key, value in found.conclusion.items():
        if not isinstance(value, list):
            yield f"{key.replace('_', ' ')}: {value}"
        else:
            yield from _table([tuple(row) for row in _rows(value)], top)
    columns = ("tensor", *found.columns)
    ranked = sorted(found.findings, key=lambda pair: -pair[1][found.columns[0]])
    rows = [(seen.name, *(_said(f[c]) for c in found.columns)) for seen, f in ranked]
    yield from _table([columns, *rows], top)
    yield f"{found.left} tensors were not looked at"


def _rows(value: list[dict[str, Any]]) -> Iterator[list[str]]:
    if value:
        yield list(value[0])
        yield from ([_said(item) for item in row.values()] for row in value)


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: list[tuple[str, ...]], top: int) -> Iterator[str]:
    yield ""
    shown = rows[: top + 1]
    widths = [max(len(row[i]) for row in shown) for i in range(len(rows[0]))] if rows else []
    for row in shown:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(rows) > len(shown):
        yield f"... and {len(rows) - len(shown)} more (--top, --json)"
