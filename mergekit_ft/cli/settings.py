"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

if TYPE_CHECKING:
    IntType = click.ParamType[int]
else:  # no generic in every release that we accept
    IntType = click.ParamType


class Size(IntType):
    """A number of bytes such as 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        from mergekit_ft.checkpoint.layout import parse_size

        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
offline = click.option("--offline", is_flag=True, help="Use what the hub's cache holds.")
allow_pickle = click.option("--allow-pickle", is_flag=True, help="Read tensors from pickles too.")
root = click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False),
    help="Where the plan's relative paths start; else here, and above OUT.",
)


def merging(command: Command) -> Command:
    """Add the options that `merge` and `check` share."""
    return _apply(
        command,
        (
            click.option(
                "--memory", type=SIZE, default="1GiB", show_default=True, help="Bytes for blocks."
            ),
            click.option(
                "--threads", type=click.IntRange(1), help="Workers; one a core, at most 8."
            ),
            click.option(
                "--max-shard-size", type=SIZE, help="Cut the weights anew; else the base's files."
            ),
            offline,
            allow_pickle,
            click.option(
                "--lenient", is_flag=True, help="Set aside what mergekit reads without effect."
            ),
            click.option(
                "--strict", is_flag=True, help="Make errors of what the inputs disagree on."
            ),
            click.option("--copy-code", is_flag=True, help="Bring the base's custom code along."),
        ),
    )


def making(command: Command) -> Command:
    """Add the options of commands that write one file from checkpoints."""
    return _apply(
        command,
        (
            click.option(
                "--memory", type=SIZE, default="1GiB", show_default=True, help="Bytes for blocks."
            ),
            click.option(
                "--threads", type=click.IntRange(1), help="Workers; one a core, at most 8."
            ),
            offline,
            allow_pickle,
            click.option(
                "--overwrite", is_flag=True, help="Replace OUT once the new one is whole."
            ),
            click.option("--quiet", is_flag=True, help="Print nothing but errors."),
            as_json,
        ),
    )


def _apply(command: Command, options: Iterable[Callable[[Command], Command]]) -> Command:
    for option in reversed(list(options)):
        command = option(command)
    return command
