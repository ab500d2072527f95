"""The command line: `mergekit-ft`."""

from __future__ import annotations

import click

from mergekit_ft import __version__
from mergekit_ft.cli.data import data
from mergekit_ft.cli.delta import delta
from mergekit_ft.cli.differing import diff
from mergekit_ft.cli.editing import edit
from mergekit_ft.cli.edits import edits
from mergekit_ft.cli.evaluating import evaluate
from mergekit_ft.cli.fusing import fuse
from mergekit_ft.cli.group import DIFFERENT, EXIT_CODES, INTERRUPTED, Main
from mergekit_ft.cli.looking import inspect, verify
from mergekit_ft.cli.lora import lora
from mergekit_ft.cli.merging import check, merge
from mergekit_ft.cli.methods import card, methods, schema
from mergekit_ft.cli.migrating import migrate
from mergekit_ft.cli.probing import probe
from mergekit_ft.cli.pushing import push
from mergekit_ft.cli.tuning import tune

__all__ = ["DIFFERENT", "INTERRUPTED", "main"]


@click.group(cls=Main, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-ft")
def main() -> None:
    """Merge checkpoints of open models: streamed, checked, reproducible."""


COMMANDS = (
    merge,
    check,
    verify,
    push,
    migrate,
    inspect,
    diff,
    probe,
    data,
    tune,
    evaluate,
    fuse,
    edit,
    edits,
    delta,
    lora,
    methods,
    card,
    schema,
)  # in the order of their use
for command in COMMANDS:
    main.add_command(command)
