"""Report pages: what is on them, that nothing breaks out of them, what a browser makes of them."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mergekit_ft.errors import WriteError
from mergekit_ft.reports import (
    Column,
    HeatMap,
    Histograms,
    Measure,
    Notes,
    Panel,
    Report,
    Table,
    draw,
    page,
    write,
)
from mergekit_ft.reports.colours import DAY, NIGHT, STEPS, blended, contrast, contrasting, ramp_of
from mergekit_ft.reports.figures import figure, visible

EVIL = "</script><script>document.title='x'</script>\"'><img src=x onerror=alert(1)>\u202e&amp;"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
BROWSER = os.environ.get("MERGEKIT_FT_BROWSER") or next(
    filter(None, map(shutil.which, BROWSERS)), None
)
browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; $MERGEKIT_FT_BROWSER names one"
)


def heat(name: str = "layers") -> HeatMap:
    values = ((0.5, 0.25, 1.0), (0.0, 0.0, None), (math.nan, math.inf, 1e-3))
    return HeatMap(
        f"By layer {name}",
        rows=("attention.q", f"mlp.up{name}", "norm"),
        columns=("all", "0", "1"),
        measures=(
            Measure("relative norm", values, "How far it moved.", scale="log"),
            Measure("changed", values, unit="%"),
        ),
        margin=True,
    )


def report(name: str = "plain") -> Report:
    rows = tuple((f"tensor.{i}{name}", i * 0.37, None if i == 3 else i) for i in range(20))
    return Report(
        f"What changed {name}",
        facts=(("A", f"./base{name}"), ("B", "org/tuned")),
        summary=(f"12 of 20 changed {name}.",),
        parts=(
            heat(name),
            Histograms(
                "Steps", ("1", "2", "3-4"), (Panel(name, (5, 3, 2), name), Panel("q", (0, 0, 0)))
            ),
            Table(
                "Tensors",
                (Column(name), Column("norm", number=True), Column("n", number=True)),
                rows,
            ),
            Notes("Notes", (name,)),
        ),
    )


class Elements(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def elements(text: str) -> Elements:
    found = Elements()
    found.feed(text)
    return found


def test_equal_reports_make_equal_pages() -> None:
    assert page(report()) == page(report())


def test_a_name_that_is_markup_stays_a_name() -> None:
    plain, hostile = elements(page(report())), elements(page(report(EVIL)))
    assert hostile.tags == plain.tags
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    assert not {name for name, _ in hostile.attributes if name.startswith("on")}
    assert any("<img src=x onerror=alert(1)>\\u202e&amp;" in text for text in hostile.texts)


def test_a_page_refers_to_nothing_outside_itself() -> None:
    text = page(report(EVIL))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    refers = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "style"}
    assert [at for at in elements(text).attributes if at[0] in refers] == [("href", "data:,")]


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("a\u202eb\x00c\ud800") == "a\\u202eb\\u0000c\\ud800"
    assert page(report("\ud800")).encode()


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.0, "", "0"),
        (0.123456, "%", "12.3%"),
        (1.0, "%", "100%"),
        (0.99997, "%", "99.997%"),
        (1234567, "", "1,234,567"),
        (1.5e-7, "", "1.50e\u22127"),
        (-0.25, "", "\u22120.250"),
        (None, "", "\u2013"),
        (math.nan, "", "not a number"),
        (-math.inf, "", "\u2212infinite"),
        (3, "ULP", "3 ULP"),
    ],
)
def test_figures_are_short_and_have_their_unit(value: Any, unit: str, said: str) -> None:
    assert figure(value, unit) == said


def test_zero_missing_and_no_number_are_marked_and_explained() -> None:
    text = page(report())
    for kind, words in (
        ("zero", "exactly zero"),
        ("none", "no such tensor"),
        ("odd", "not a finite"),
    ):
        assert f'class="{kind}"' in text
        assert words in text


def test_colours_run_over_what_is_there() -> None:
    ramp = ramp_of(Measure("m", ((0.01, 1.0, 0.0, None, math.nan),), scale="log"))
    assert ramp is not None
    assert (ramp.low, ramp.high, ramp.scale) == (0.01, 1.0, "log")
    assert [ramp.step(x) for x in (0.01, 0.1, 1.0)] == [0, STEPS // 2, STEPS - 1]
    assert ramp.at(0.5) == pytest.approx(0.1)
    assert ramp_of(Measure("m", ((0.0, None),))) is None
    few = ramp_of(Measure("m", ((1e-9, *[1.0] * 18, 2.0),), scale="log"))
    assert few is not None
    assert (few.low, few.high, few.clipped, few.step(1e-9)) == (1.0, 2.0, True, 0)
    below = ramp_of(Measure("m", ((-1.0, 1.0),), scale="log"))
    assert below is not None
    assert below.scale == "linear"


@pytest.mark.parametrize("stops", [DAY, NIGHT])
def test_colours_differ_by_lightness_and_carry_readable_ink(stops: tuple[str, ...]) -> None:
    colours = [blended(stops, step / (STEPS - 1)) for step in range(STEPS)]
    black = [contrast("#000000", colour) for colour in colours]
    assert black in (sorted(black), sorted(black, reverse=True))
    assert all(contrast(contrasting(colour), colour) >= 4.5 for colour in colours)


def test_a_part_whose_cells_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="value for each cell"):
        HeatMap("t", ("a",), ("0", "1"), (Measure("m", ((1.0,),)),))
    with pytest.raises(ValueError, match="cell for each column"):
        Table("t", (Column("a"),), ((1, 2),))
    with pytest.raises(ValueError, match="count for each bin"):
        Histograms("t", ("1",), (Panel("p", (1, 2)),))


def test_a_report_replaces_a_file_only_where_that_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    write(path, "one", overwrite=False)
    with pytest.raises(WriteError, match="exists; --overwrite replaces it"):
        write(path, "two", overwrite=False)
    write(path, "two", overwrite=True)
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["out.html"]
    with pytest.raises(WriteError, match="there is no folder"):
        write(tmp_path / "none" / "out.html", "x", overwrite=False)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_charts_are_drawn_and_equal_maps_are_equal_files(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"{number}.{ending}" for number in range(2)]
    for path in paths:
        draw(heat(EVIL + "$x_1$"), "relative norm", path, title="A to B")
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_a_chart_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_ft.reports.plot.find_spec", lambda name: None)
    with pytest.raises(WriteError, match=re.escape("pip install 'mergekit-ft[plot]'")):
        draw(heat(), "changed", tmp_path / "a.png", title="")
    with pytest.raises(WriteError, match=re.escape("ends in .png or .svg")):
        draw(heat(), "changed", tmp_path / "a.jpg", title="")
    assert importlib.util.find_spec("mergekit_ft.reports")


# What the page does in a browser: each line sets `document.title` to what was found.
TRIAL = """
<script>
addEventListener("error", (e) => faults.push(e.message));
const faults = [];
addEventListener("securitypolicyviolation", (e) => faults.push(e.violatedDirective));
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const buttons = table.querySelectorAll("button");
  const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent);
  buttons[2].click();
  const down = column(2);
  buttons[2].click();
  const up = column(2);
  const field = document.querySelector("input[type=search]");
  field.value = "TENSOR.7";
  field.dispatchEvent(new Event("input"));
  const left = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
  const views = [...document.querySelectorAll(".view")];
  const seen = () => views.map((view) => getComputedStyle(view).display !== "none");
  const before = seen();
  document.querySelectorAll(".choice label")[1].click();
  const cell = document.querySelector(".view table.grid tbody td");
  cell.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
  const tip = document.getElementById("tip");
  const told = tip.hidden ? "" : tip.textContent;
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = {faults, down, up, left, before, after: seen(), told, loaded};
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(out);
  document.body.append(said);
});
</script>
"""


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Return what opens a page in a browser: what it logged, what it asked for, what it became."""
    asked: list[str] = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(str(args[0]))

    handler = functools.partial(Server, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def run(text: str) -> tuple[str, list[str], str]:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        profile = tmp_path / "profile"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking"]
        flags += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
        # every name but this server's leads nowhere
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        done = subprocess.run(
            [str(BROWSER), *flags, address], capture_output=True, text=True, timeout=60
        )
        return done.stdout, list(asked), done.stderr

    yield run
    server.shutdown()
    server.server_close()


def console(log: str) -> list[str]:
    """Return what the page itself logged."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.parametrize("name", ["plain", EVIL])
def test_a_browser_shows_a_page_without_an_error_or_a_request(opened: Any, name: str) -> None:
    text = page(report(name))
    dom, asked, log = opened(text)
    assert console(log) == []
    assert asked == ["GET /page.html HTTP/1.1"]
    assert f"What changed {name}".startswith(re.search(r"<title>(What changed)", dom)[1])  # type: ignore[index]
    assert dom.count("<button") == 3  # the script ran


@browser
def test_a_page_sorts_searches_and_tells_in_a_browser(opened: Any) -> None:
    text = page(report())
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    dom, _, log = opened(without_policy.replace("</head>", f"{TRIAL}</head>"))
    assert console(log) == []
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1])  # type: ignore[index]
    assert found["faults"] == []
    assert found["loaded"] == []
    numbers = [str(i) for i in range(20) if i != 3]
    assert found["down"] == [*reversed(numbers), "\u2013"]  # what is not there comes last
    assert found["up"] == [*numbers, "\u2013"]
    assert found["left"] == 1
    assert found["before"] == [True, False]
    assert found["after"] == [False, True]
    assert found["told"] == "attention.q, allrelative norm0.500changed50%"


@browser
def test_the_policy_of_a_page_stops_a_script_that_is_not_its_own(opened: Any) -> None:
    text = page(report()).replace("</main>", "<script>document.title = 'broken'</script></main>")
    dom, _, log = opened(text)
    assert "<title>broken" not in dom
    assert any("Content Security Policy" in line for line in console(log))
