"""Run the command line as `python -m mergekit_ft`."""

from __future__ import annotations

from mergekit_ft.cli import main

if __name__ == "__main__":
    main(prog_name="mergekit-ft")
