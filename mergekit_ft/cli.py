"""The command line: `mergekit-ft`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_ft import __version__, registry
from mergekit_ft.errors import MergekitError, PlanError

if TYPE_CHECKING:
    from mergekit_ft.engine import Result

Command = TypeVar("Command", bound=Callable[..., Any])
DIFFERENT = 1  # exit code of `verify`
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 ok; 1 verification differs; 2 usage; 3 plan; 4 source; 5 operator (values that "
    "do not merge); 6 write; 130 interrupted."
)


class Main(click.Group):
    """A group that ends every error a user can meet in clear lines and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except MergekitError as error:
            placed = isinstance(error, PlanError) or "\n" in str(error)  # each line has its place
            click.echo(str(error) if placed else f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            merging = ctx.invoked_subcommand == "merge"
            more = "; the same command with --resume goes on from here" if merging else ""
            click.echo(f"\ninterrupted{more}", err=True)
            ctx.exit(INTERRUPTED)


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


def _apply(command: Command, options: Iterable[Callable[[Command], Command]]) -> Command:
    for option in reversed(list(options)):
        command = option(command)
    return command


def _merging(command: Command) -> Command:
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
            click.option("--offline", is_flag=True, help="Use what the hub's cache holds."),
            click.option("--allow-pickle", is_flag=True, help="Read tensors from pickles too."),
            click.option("--copy-code", is_flag=True, help="Bring the base's custom code along."),
        ),
    )


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_root = click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False),
    help="Where the plan's relative paths start; else here, and above OUT.",
)


@click.group(cls=Main, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-ft")
def main() -> None:
    """Merge checkpoints of open models: streamed, checked, reproducible."""


@main.command(epilog="An interrupted merge leaves OUT.part, which --resume finishes.")
@click.argument("plan")
@click.argument("out")
@_merging
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--resume", is_flag=True, help="Finish what a stopped run left in OUT.part.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@click.option("--allow-non-finite", is_flag=True, help="Let NaN and Inf pass.")
@click.option("--allow-unchanged", is_flag=True, help="Accept a result that equals the base.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@_json
def merge(plan: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Carry out PLAN (a file, or - for stdin) and write the checkpoint to OUT."""
    given = _plan(plan)
    with _watched(quiet) as progress:
        from mergekit_ft.engine import merge as run

        result = run(given, out, progress=progress, **options)
    if as_json:
        _print_json(_summary(result))
    elif not quiet:
        _print(_result_lines(result))


@main.command()
@click.argument("plan")
@_merging
@_json
def check(plan: str, as_json: bool, **options: Any) -> None:
    """Resolve everything in PLAN from headers and say what a merge would do."""
    from mergekit_ft.inspection import check as room
    from mergekit_ft.options import Options

    report, resolution = room.check(_plan(plan), Options(**options))
    if as_json:
        _print_json(report)
    else:
        _print(room.lines(report, resolution))


@main.command()
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--sample", type=click.IntRange(0), default=16, show_default=True, help="Tensors.")
@click.option("--full", is_flag=True, help="Compute every tensor again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option("--inputs/--no-inputs", default=None, help="Insist on hashing the inputs, or do not.")
@click.option("--memory", type=SIZE, default="4GiB", show_default=True, help="For one tensor.")
@_root
@click.option("--download", is_flag=True, help="Fetch inputs that the hub's cache lacks.")
@_json
def verify(out: str, as_json: bool, **asked: Any) -> None:
    """Hash OUT's files again and recompute a sample of its tensors in float64."""
    from pathlib import Path

    from mergekit_ft.inspection import verify as room

    sample = None if asked.pop("full") else asked.pop("sample")
    asked.pop("sample", None)
    root, offline = asked.pop("root"), not asked.pop("download")
    where = Path(root) if root else None
    with _watched(quiet=not sys.stderr.isatty()) as bar:
        found = {"sample": sample, "root": where, "offline": offline, "progress": bar}
        report = room.verify(Path(out), **found, **asked)
    if as_json:
        _print_json(report)
    else:
        _print(room.lines(report))
    click.get_current_context().exit(0 if report["ok"] else DIFFERENT)


@main.command()
@click.argument("path")
@click.option("--tensors/--no-tensors", default=True, help="List every tensor.")
@click.option("--offline", is_flag=True, help="Use what the hub's cache holds.")
@click.option("--allow-pickle", is_flag=True, help="Read tensors from pickles too.")
@_json
def inspect(path: str, as_json: bool, **options: Any) -> None:
    """Say what the headers of the checkpoint at PATH (a folder, or a hub id) hold."""
    from mergekit_ft.inspection import headers

    report = headers.inspect(path, **options)
    if as_json:
        _print_json(report)
    else:
        _print(headers.lines(report))


@main.command()
@_json
def methods(as_json: bool) -> None:
    """List the methods."""
    found = [
        {"name": name, "kind": "operator", "summary": registry.summary(name)}
        for name in registry.names()
    ]
    if as_json:
        _print_json(found)
        return
    width = max((len(entry["name"]) for entry in found), default=0)
    _print(f"{e['name'].ljust(width)}  {e['kind']}  {e['summary']}" for e in found)


@main.command()
@click.argument("method")
def card(method: str) -> None:
    """Print the card of METHOD: what it computes, its parameters, where they come from."""
    click.echo(registry.card(method).rstrip("\n"))


@main.command()
def schema() -> None:
    """Print the JSON Schema of a plan, with every method's parameters."""
    from mergekit_ft.plan import schema as of_plan

    _print_json(of_plan())


def _plan(plan: str) -> str:
    """Return the plan's file, or the text that stdin gives."""
    return sys.stdin.read() + "\n" if plan == "-" else plan


@contextmanager
def _watched(quiet: bool) -> Iterator[Any]:
    """Give what shows the progress, and end it whatever comes."""
    if quiet:
        yield None
        return
    from mergekit_ft.inspection.progress import watcher

    shown = watcher()
    try:
        yield shown
    finally:
        shown.close()


def _summary(result: Result) -> dict[str, Any]:
    names = ("tensors", "changed", "bytes_read", "bytes_written", "notes", "receipt")
    return {"out": str(result.out), **{name: getattr(result, name) for name in names}}


def _result_lines(result: Result) -> Iterator[str]:
    from mergekit_ft.inspection.tables import count, size

    yield from (f"note: {note}" for note in result.notes)
    yield (
        f"{result.out}: changed {result.changed:,} of {count(result.tensors, 'tensor')}, "
        f"{size(result.bytes_written)}"
    )


def _print(lines: Iterable[str]) -> None:
    click.echo("\n".join(lines))


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
