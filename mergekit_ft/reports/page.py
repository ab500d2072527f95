"""One HTML page that needs nothing else: no network, no fonts, no scripts but its own few lines."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

from mergekit_ft.reports.charts import histograms
from mergekit_ft.reports.colours import rules
from mergekit_ft.reports.figures import escaped
from mergekit_ft.reports.heat import heat_map, shown_when_chosen
from mergekit_ft.reports.report import HeatMap, Histograms, Notes, Part, Report, Table
from mergekit_ft.reports.tables import table

HERE = Path(__file__).parent


def page(report: Report) -> str:
    """Return a report as HTML; equal reports give equal pages."""
    return "\n".join([*_head(report), *_body(report), ""])


def _head(report: Report) -> Iterator[str]:
    style, script = _style(report), _file("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_hash(style)}'; "
        f"script-src 'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield '<meta name="generator" content="mergekit-ft">'
    yield '<link rel="icon" href="data:,">'
    yield f"<title>{escaped(report.title)}</title>"
    yield f"<style>{style}</style>\n</head>"


def _body(report: Report) -> Iterator[str]:
    yield "<body>\n<main>\n<header>"
    yield f"<h1>{escaped(report.title)}</h1>"
    if report.facts:
        yield '<dl class="facts">'
        for name, value in report.facts:
            yield f"<div><dt>{escaped(name)}</dt><dd><bdi>{escaped(value)}</bdi></dd></div>"
        yield "</dl>"
    yield "</header>"
    if report.summary:
        said = "".join(f"<p>{escaped(line)}</p>" for line in report.summary)
        yield f'<section class="summary" aria-label="Summary">{said}</section>'
    for key, part in _keyed(report):
        yield from _part(part, key)
    yield '<footer>Made by <b>mergekit-ft</b>.</footer>\n</main>\n<div id="tip" hidden></div>'
    yield f"<script>{_file('page.js')}</script>\n</body>\n</html>"


def _keyed(report: Report) -> Iterator[tuple[str, Part]]:
    return ((f"p{number}", part) for number, part in enumerate(report.parts))


def _part(part: Part, key: str) -> Iterator[str]:
    if isinstance(part, HeatMap):
        yield from heat_map(part, key)
    elif isinstance(part, Histograms):
        yield from histograms(part, key)
    elif isinstance(part, Table):
        yield from table(part, key)
    else:
        yield from _notes(part, key)


def _notes(part: Notes, key: str) -> Iterator[str]:
    lines = "".join(f"<li><bdi>{escaped(line)}</bdi></li>" for line in part.lines)
    yield f'<section class="notes" aria-labelledby="{key}"><h2 id="{key}">{escaped(part.title)}'
    yield f"</h2><ul>{lines}</ul></section>"


def _style(report: Report) -> str:
    parts = [_file("page.css"), *rules()]
    for key, part in _keyed(report):
        if isinstance(part, HeatMap):
            parts += shown_when_chosen(part, key)
    return "\n".join(parts)


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return by which hash the page's policy lets this text run, and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
