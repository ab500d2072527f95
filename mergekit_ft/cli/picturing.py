"""Pages and charts that a command writes of what it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mergekit_ft.cli.settings import Command

if TYPE_CHECKING:
    from mergekit_ft.reports import HeatMap, Report


def pictures(command: Command) -> Command:
    """Add the options that `Pictures` is made of."""
    options = (
        click.option("--report", type=click.Path(), help="Write all of it as one HTML page."),
        click.option(
            "--plot", type=click.Path(), help="Draw the map of layers and modules: .png or .svg."
        ),
        click.option("--overwrite", is_flag=True, help="Replace the files of --report and --plot."),
    )
    for option in reversed(options):
        command = option(command)
    return command


class Pictures(NamedTuple):
    """The files that are asked for beside what is printed."""

    report: str | None
    plot: str | None
    overwrite: bool

    def __bool__(self) -> bool:
        return bool(self.report or self.plot)

    def require_room(self) -> None:
        """Refuse, before a weight is read, what could not be written or has no effect."""
        from mergekit_ft.reports import require_matplotlib, require_room

        if self.overwrite and not self:
            raise click.UsageError("--overwrite is about the files of --report and --plot")
        if self.report:
            require_room(Path(self.report), overwrite=self.overwrite)
        if self.plot:
            require_matplotlib(Path(self.plot), overwrite=self.overwrite)

    def write(self, found: Report, part: HeatMap | None, measure: str) -> None:
        """Write the page, and the chart of one measure of a map."""
        from mergekit_ft.errors import WriteError
        from mergekit_ft.reports import draw, page, write

        if self.report:
            write(Path(self.report), page(found), overwrite=self.overwrite)
        if self.plot:
            if part is None:
                raise WriteError(f"{self.plot}: there is nothing to draw: no tensor of a layer")
            draw(part, measure, Path(self.plot), title=found.title, overwrite=self.overwrite)
