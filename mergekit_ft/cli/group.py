"""The group of commands, and how each of them ends."""

from __future__ import annotations

from typing import Any

import click

from mergekit_ft.errors import MergekitError, PlanError

DIFFERENT = 1  # exit code of `verify` and `diff`
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 ok; 1 something differs; 2 usage; 3 plan; 4 source; 5 operator (values that "
    "do not merge); 6 write; 130 interrupted."
)


class Main(click.Group):
    """A group that ends every error a user can meet in clear lines and its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their use."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except MergekitError as error:
            placed = isinstance(error, PlanError) or "\n" in str(error)  # each line has its place
            click.echo(str(error) if placed else f"error: {error}", err=True)
            if ctx.invoked_subcommand in ("merge", "check") and isinstance(error, PlanError):
                _say_way_out(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            merging = ctx.invoked_subcommand in ("merge", "tune")
            more = "; the same command with --resume goes on from here" if merging else ""
            more = (
                "; the same command goes on from here" if ctx.invoked_subcommand == "fuse" else more
            )
            click.echo(f"\ninterrupted{more}", err=True)
            ctx.exit(INTERRUPTED)


def _say_way_out(error: PlanError) -> None:
    """Name what helps with words that mergekit reads without effect."""
    idle = sum(bool(fault.aside) for fault in error.faults)
    if idle:
        count = len(error.faults)
        of = f"{idle} of these {count}" if idle < count else "this" if count == 1 else "all of this"
        said = f"hint: mergekit reads {of} without effect: `mergekit-ft migrate` writes the plan "
        click.echo(f"{said}without, --lenient sets it aside", err=True)
