"""Reports that a person reads: one HTML page that holds all it needs, and charts.

A `Report` is a title, facts, sentences that sum it up, and parts in the order of reading:
`HeatMap`, `Histograms`, `Table`, `Notes`. Who has findings makes one; nobody writes HTML:

    report = Report(
        "Intruder dimensions",
        facts=(("base", "org/base"), ("tuned", "./tuned")),
        summary=("12 of 210 matrices hold intruders.",),
        parts=(
            HeatMap(
                "Intruders by layer and module",
                rows=("self_attn.q_proj", "mlp.up_proj"),
                columns=("all", "0", "1", "2"),
                measures=(Measure("intruders", ((3, 0, 1, 2), (0, 0, 0, None))),),
                margin=True,  # the first column sums up the others
            ),
            Table("Matrices", (Column("matrix"), Column("intruders", number=True)), rows=...),
        ),
    )
    write(Path("out.html"), page(report), overwrite=False)
    draw(heat_map, "intruders", Path("out.png"), title="...")  # matplotlib, the extra `plot`

Names and paths are escaped wherever they stand, so they may hold anything. None stands for what
is not there, zero and "not a number" are marked as such. Equal reports make equal bytes.
"""

from mergekit_ft.reports.page import page
from mergekit_ft.reports.plot import draw, require_matplotlib
from mergekit_ft.reports.report import (
    Column,
    HeatMap,
    Histograms,
    Measure,
    Notes,
    Panel,
    Part,
    Report,
    Table,
)
from mergekit_ft.reports.writing import require_room, write

__all__ = [
    "Column",
    "HeatMap",
    "Histograms",
    "Measure",
    "Notes",
    "Panel",
    "Part",
    "Report",
    "Table",
    "draw",
    "page",
    "require_matplotlib",
    "require_room",
    "write",
]
