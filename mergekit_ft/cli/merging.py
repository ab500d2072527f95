"""The commands that carry a plan out, or say what that would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mergekit_ft.cli import printing, pushing, settings
from mergekit_ft.errors import MergekitError, WriteError

if TYPE_CHECKING:
    from mergekit_ft.engine import Result
    from mergekit_ft.publishing import Pushed


@click.command(epilog="An interrupted merge leaves OUT.part, which --resume finishes.")
@click.argument("plan")
@click.argument("out")
@settings.merging
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--resume", is_flag=True, help="Finish what a stopped run left in OUT.part.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole.")
@click.option("--allow-non-finite", is_flag=True, help="Let NaN and Inf pass.")
@click.option("--allow-unchanged", is_flag=True, help="Accept a result that equals the base.")
@click.option("--push", "repo", metavar="REPO", help="Then send it to the hub, as `push` does.")
@click.option("--public", is_flag=True, help="With --push: for everyone to see; else private.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@settings.as_json
def merge(
    plan: str, out: str, repo: str | None, public: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Carry out PLAN (a file, or - for stdin) and write the checkpoint to OUT."""
    given = printing.plan_of(plan)
    _require_login(repo, public, options)
    result = _merged(given, out, quiet, options)
    if not (as_json or quiet):
        printing.lines(_result_lines(result))
    done = _pushed(out, repo, public=public, quiet=quiet or as_json) if repo else None
    if as_json:
        printing.json_of(_summary(result) | ({"pushed": asdict(done)} if done else {}))
    elif done and not quiet:
        printing.lines(pushing.lines(done))


@click.command()
@click.argument("plan")
@settings.merging
@settings.as_json
def check(plan: str, as_json: bool, **options: Any) -> None:
    """Resolve everything in PLAN from headers and say what a merge would do."""
    from mergekit_ft.inspection import check as room
    from mergekit_ft.options import Options
    from mergekit_ft.plan.fusing import calibrates

    given: Any = printing.plan_of(plan)
    chosen = Options(**options)
    wanted: dict[str, Any] = {}
    if calibrates(given):
        from mergekit_ft.fusion.merging import needs

        wanted["calibration"], given = needs(given, chosen)
    report, resolution = room.check(given, chosen)
    if as_json:
        printing.json_of(report | wanted)
    else:
        printing.lines([*room.lines(report, resolution), *_calibration_lines(**wanted)])


def _merged(plan: str, out: str, quiet: bool, options: dict[str, Any]) -> Result:
    """Merge, after fitting the weights where the plan asks for that."""
    from mergekit_ft.plan.fusing import calibrates

    if calibrates(plan):
        with printing.watched(quiet, "place") as progress:
            from mergekit_ft.fusion import merge as fitting

            return fitting(plan, out, progress=progress, **options)
    with printing.watched(quiet) as progress:
        from mergekit_ft.engine import merge as run

        return run(plan, out, progress=progress, **options)


def _calibration_lines(calibration: dict[str, Any] | None = None) -> Iterator[str]:
    from mergekit_ft.inspection.tables import size

    if calibration is not None:
        yield from (f"note: {note}" for note in calibration["notes"])
        yield (
            f"calibration: {calibration['models']} models are asked about "
            f"{calibration['places']:,} places ({calibration['held_out']:,} held out) of "
            f"{', '.join(calibration['domains'])}; {size(calibration['bytes'])} beside OUT while "
            "weights are fitted; weights above are stand-ins"
        )


def _require_login(repo: str | None, public: bool, options: dict[str, Any]) -> None:
    """Refuse what would keep the merge from being sent, before it is made."""
    if public and not repo:
        raise click.UsageError("--public is for --push REPO; without one it has no effect")
    if repo and options["offline"]:
        raise click.UsageError("--push needs the hub, which --offline stays away from")
    if repo:
        from mergekit_ft import publishing

        publishing.require_login(repo)


def _pushed(out: str, repo: str, **options: Any) -> Pushed:
    try:
        return pushing.pushed(out, repo, **options)
    except MergekitError as error:
        again = f"{out} is whole, and `mergekit-ft push {out} {repo}` sends it"
        raise WriteError(f"{error}; {again}") from error


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
